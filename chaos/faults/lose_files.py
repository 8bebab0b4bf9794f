"""Files of a mesh's state folder are removed while it runs, as a careless clean-up does; then its victims are killed.

A process that has a file open notices nothing. It hurts when the next process wants to connect, or to know whether a
router lives. So the victims are killed some time later: the mesh has had that time to make the files again.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from chaos.faults.background import BackgroundFault
from chaos.faults.base import Range
from chaos.faults.processes import state_folder
from chaos.target import Node, Target, TargetError
from common.wire.endpoints import ipc_folder

OWN_FILES = ("mesh.lock", "router.lock", "router.json", "http.url")


Lost = Literal["sockets", "folder", "all"]


class LoseFiles(BackgroundFault):
    """The `sockets` go, or their `folder` too, or `all` files but logs and journal. The mesh makes them again itself.

    Its victims are killed `kill_after_s` later; 0 kills none.
    """

    name = "lose_files"
    what: Lost = "sockets"
    kill_after_s: Annotated[float, Range(0, 60)] = 2

    def unavailable(self, target: Target) -> str:
        try:
            folders = [socket_folder(node) for node in target.nodes()]
        except TargetError as error:
            return str(error)
        return "" if any(map(sockets_in, folders)) else "the mesh has no socket files; its links are TCP"

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            remove(socket_folder(victim), state_folder(victim), self.what)
        if self.kill_after_s:
            self._begin(lambda: self._kill(target, victims), patience_s=self.kill_after_s + 1)

    def _kill(self, target: Target, victims: Sequence[Node]) -> None:
        if not self._stopped.wait(self.kill_after_s):
            for victim in victims:
                target.signal(victim, signal.SIGKILL)


def socket_folder(node: Node) -> Path:
    """Returns where the sockets of a mesh lie whose links are files, as this process reaches it. Raises TargetError."""
    return ipc_folder(state_folder(node))


def sockets_in(folder: Path) -> list[Path]:
    """Returns the sockets of a folder, or none where there is no such folder."""
    return sorted(path for path in folder.glob("*") if path.is_socket())


def remove(sockets: Path, state: Path, what: Lost) -> None:
    """Removes what `LoseFiles.what` says. Raises TargetError for what cannot be removed."""
    try:
        for path in sockets_in(sockets):
            path.unlink(missing_ok=True)
        if what != "sockets":
            shutil.rmtree(sockets, ignore_errors=True)
        if what == "all":
            for name in OWN_FILES:
                (state / name).unlink(missing_ok=True)
    except OSError as error:
        raise TargetError(f"{error.filename}: {error.strerror}") from None
