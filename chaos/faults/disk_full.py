"""The disk of the router's state folder is full: a file takes what is left, and goes away when it is healed.

Only a file system of at most MAX_BYTES is filled: a machine must not lose its disk for a test. So the mesh must keep
its state on a small one: containers get it from the overlay compose/compose.chaos.yaml.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from chaos.faults.base import Fault, Range
from chaos.faults.processes import state_folder
from chaos.target import Node, Target, TargetError

MAX_BYTES = 1 << 30
FILLER = "chaos-disk-full"


class DiskFull(Fault):
    """The file system that holds STATE_DIR of each victim is filled until `left_kib` are left."""

    name = "disk_full"
    left_kib: Annotated[int, Range(0, 1 << 20)] = 0

    def unavailable(self, target: Target) -> str:
        routers = [node for node in target.nodes() if node.kind == "router"]
        try:
            return refusal(state_folder(routers[0])) if routers else "there is no router whose state folder can be seen"
        except TargetError as error:
            return str(error)

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            folder = state_folder(victim)
            if reason := refusal(folder):
                raise TargetError(reason)
            # By the folder itself: the path leads through a process that may end before this is undone.
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            self._undo.add(_remove, handle)
            fill(handle, self.left_kib << 10)


def refusal(folder: Path) -> str:
    """Returns a sentence that says why the file system of a folder is not filled, or nothing if it may be."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    size = status.f_blocks * status.f_frsize
    if size > MAX_BYTES:
        return f"STATE_DIR lies on a file system of {size >> 20} MiB; only one of at most {MAX_BYTES >> 20} is filled"
    return ""


def fill(folder: int, left_bytes: int) -> None:
    """Takes all space but this much with one file, in ever smaller steps. `folder` is an open folder."""
    handle = os.open(FILLER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600, dir_fd=folder)
    try:
        for step in (1 << 20, 1 << 12, 1 << 9):
            while (free := _free_bytes(folder)) > left_bytes or left_bytes == 0:
                try:
                    os.write(handle, bytes(min(step, max(1, free - left_bytes))))
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise TargetError(f"{FILLER}: {error.strerror}") from None
                    break
    finally:
        os.close(handle)


def _free_bytes(folder: int) -> int:
    status = os.fstatvfs(folder)
    return status.f_bavail * status.f_frsize


def _remove(folder: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(FILLER, dir_fd=folder)
    os.close(folder)
