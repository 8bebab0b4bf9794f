"""A service that may have few files and sockets open:

python -m tests.support.processes.few_descriptors 128 services.router
"""

from __future__ import annotations

import resource
import runpy
import sys


def main() -> None:
    number, module = int(sys.argv[1]), sys.argv[2]
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
