"""Control groups of a process, of version 1 or 2: where its limits are written.

A container has a group of its own, which is used as it is. A local process is moved into one made for it, and back.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chaos.faults.base import UndoList
from chaos.target import Node, TargetError

ROOT = Path("/sys/fs/cgroup")


def group_path(text: str, controller: str) -> str:
    """Returns the group of a process for a controller, from the text of /proc/PID/cgroup; version 2 has one for all."""
    rows = [line.split(":", 2) for line in text.splitlines()]
    for _, controllers, path in rows:
        if controller in controllers.split(","):
            return path
    return next((path for _, controllers, path in rows if not controllers), "")


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """One group: a folder under /sys/fs/cgroup."""

    folder: Path
    is_version_2: bool

    def read(self, name: str) -> str:
        """Returns what stands in one of its files. Raises TargetError."""
        try:
            return (self.folder / name).read_text().strip()
        except OSError as error:
            raise TargetError(f"{self.folder / name}: {error.strerror}") from None

    def write(self, name: str, value: str) -> str:
        """Sets a limit and returns the one before. Raises TargetError."""
        before = self.read(name)
        try:
            (self.folder / name).write_text(value)
        except OSError as error:
            raise TargetError(f"{self.folder / name} = {value}: {error.strerror}") from None
        return before

    def restore(self, name: str, value: str) -> None:
        """Undoes `write`; a group that went with its container has nothing to undo."""
        if self.folder.exists():
            self.write(name, value)

    def enter(self, pid: int) -> None:
        """Moves a process here. Raises TargetError, also when the process is gone."""
        try:
            (self.folder / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise TargetError(f"process {pid} into {self.folder}: {error.strerror}") from None


def unavailable(controller: str) -> str:
    """Returns why limits of this kind (`cpu`, `memory`) cannot be set here, or "" if they can."""
    if (ROOT / "cgroup.controllers").exists():
        if controller not in (ROOT / "cgroup.controllers").read_text().split():
            return f"the {controller} controller of control groups is not there"
        folder = ROOT
    else:
        folder = ROOT / controller
    if not (folder / "cgroup.procs").exists():
        return f"there are no control groups for {controller}"
    return "" if os.access(folder / "cgroup.procs", os.W_OK) else "control groups cannot be written here"


def group_of(node: Node, controller: str, undo: UndoList) -> ControlGroup:
    """Returns a group with only this node's processes; undoing gives a local process back. Raises TargetError."""
    is_version_2 = (ROOT / "cgroup.controllers").exists()
    top = ROOT if is_version_2 else ROOT / controller
    try:
        own = group_path(Path(f"/proc/{node.pid}/cgroup").read_text(), controller)
    except OSError:
        raise TargetError(f"{node.name} is gone") from None
    before = ControlGroup(top / own.lstrip("/"), is_version_2)
    if node.container:
        return before
    made = ControlGroup(top / f"moemesh-chaos-{node.name}-{node.pid}", is_version_2)
    try:
        if is_version_2:
            (top / "cgroup.subtree_control").write_text(f"+{controller}")
        made.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise TargetError(f"{made.folder}: {error.strerror}") from None
    undo.add(_give_back, made, before)
    made.enter(node.pid)
    return made


def _give_back(made: ControlGroup, before: ControlGroup) -> None:
    for pid in made.read("cgroup.procs").split():
        with suppress(TargetError):  # it may end just now
            before.enter(int(pid))
    try:
        made.folder.rmdir()
    except OSError as error:
        raise TargetError(f"{made.folder}: {error.strerror}") from None
