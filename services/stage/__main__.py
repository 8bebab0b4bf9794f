"""`python -m services.stage`: one anonymous stage node."""

from __future__ import annotations

import os

from common.processes.quick_imports import quick_imports

with quick_imports():
    from common.config import read_settings
    from common.node.process import end_process, run_process
    from services.stage.process import serve


def main() -> int:
    """Returns exit status 0 after an orderly stop, and 1, with a sentence, where it cannot go on."""
    return run_process("stage", os.environ.get("LOG_LEVEL", "info"), lambda log: serve(read_settings(), log))


if __name__ == "__main__":
    end_process(main())
