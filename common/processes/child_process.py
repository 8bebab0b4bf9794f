"""What a process does for its children before they begin, and what it asks of them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_NAME_BYTES = 15
_PACKAGES = Path(__file__).resolve().parents[2]
"""The folder that this project's packages are imported from."""


def start_module(
    module: str,
    *arguments: str,
    environment: Mapping[str, str],
    log: BinaryIO | None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Starts `python -m module arguments` in a session of its own: Ctrl-C goes to its creator, which ends its children
    in order. It prints to `log`, and ends with the thread that calls this. Raises OSError, subprocess.SubprocessError.

    Whatever lies in the folder that it is started from, which may have packages of the same names, it imports this
    project's own: -P keeps that folder out of the path of imports, and theirs comes before all others.
    """
    parent, others = os.getpid(), environment.get("PYTHONPATH")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(_PACKAGES), *([others] if others else [])])},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=lambda: end_with_parent(parent),
    )


def end_with_parent(parent: int) -> None:
    """Asks, in the child, for SIGKILL when its parent ends, however it ends (a paused one hears no other)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def name_process(name: str) -> None:
    """Sets what `top` and `ps -o comm` show, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:_NAME_BYTES])
