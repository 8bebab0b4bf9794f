"""Runs a module on a played host: `python -m chaos.targets.on_host MODULE [ARGUMENT ...]`.

CHAOS_NAMESPACE names the network namespace that the process enters first. Without it the process stays where it is.
CHAOS_OWN_FOLDER names a folder in whose place the process and its children have an empty one of their own, in a mount
namespace of their own, as on a machine that has no file of that folder. Without it they share all files.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
from pathlib import Path

NAMESPACES = Path("/run/netns")
NAMESPACE_VARIABLE = "CHAOS_NAMESPACE"
OWN_FOLDER_VARIABLE = "CHAOS_OWN_FOLDER"
_CLONE_NEWNET = 0x40000000
_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


def enter_namespace(path: Path) -> None:
    """Moves this process, which has one thread, into a network namespace. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as namespace:
        _check(library.setns(namespace.fileno(), _CLONE_NEWNET), f"{path} cannot be entered")


def own_folder(path: Path) -> None:
    """Gives this process a mount namespace of its own, and an empty folder in memory at `path`, which exists. Raises
    OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    _check(library.unshare(_CLONE_NEWNS), "no mount namespace can be made")
    # Or what is mounted here is mounted for all.
    _check(library.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mounts stay shared")
    mounted = library.mount(b"tmpfs", os.fsencode(path), b"tmpfs", ctypes.c_ulong(0), None)
    _check(mounted, f"no folder of its own at {path}")


def _check(status: int, what: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    if name := os.environ.get(NAMESPACE_VARIABLE):
        enter_namespace(NAMESPACES / name)
    if folder := os.environ.get(OWN_FOLDER_VARIABLE):
        own_folder(Path(folder))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
