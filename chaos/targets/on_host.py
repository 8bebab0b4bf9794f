"""Runs a module on a played host: `python -m chaos.targets.on_host MODULE [ARGUMENT ...]`.

CHAOS_NAMESPACE names the network namespace that the process enters first. Without it the process stays where it is.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
from pathlib import Path

NAMESPACES = Path("/run/netns")
NAMESPACE_VARIABLE = "CHAOS_NAMESPACE"
_CLONE_NEWNET = 0x40000000


def enter_namespace(path: Path) -> None:
    """Moves this process, which has one thread, into a network namespace. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as namespace:
        if library.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{path} cannot be entered: {os.strerror(number)}")


if __name__ == "__main__":
    if name := os.environ.get(NAMESPACE_VARIABLE):
        enter_namespace(NAMESPACES / name)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
