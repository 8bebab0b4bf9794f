"""Files of a mesh's state folder are removed while it runs, as a careless clean-up does; then its victims are killed.

Who has a file open notices nothing. It hurts when the next process wants to connect, or to know whether a router lives.
So the victims are killed some time later: the mesh has had that time to make the files again.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.faults.background import BackgroundWork
from chaos.faults.disk_full import state_folder
from chaos.faults.parameters import Parameters
from chaos.target import Node, Target, TargetError
from common.wire.endpoints import ipc_folder

OWN_FILES = ("mesh.lock", "router.lock", "router.json", "http.url")


@dataclass(slots=True)
class LoseFiles:
    """`what`: the `sockets`, or their `folder`, or `all` files but logs and journal. `kill_after_s`: 0 kills nobody."""

    what: str
    kill_after_s: float
    name: str = "lose_files"
    needs: frozenset[str] = frozenset({"processes"})
    _work: BackgroundWork = field(default_factory=BackgroundWork)

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
            self._work.begin(lambda stopped: self._kill(target, victims, stopped))

    def heal(self, target: Target) -> None:
        """What was removed is the mesh's own business; only the kill is waited for."""
        self._work.finish(patience_s=self.kill_after_s + 1)

    def _kill(self, target: Target, victims: Sequence[Node], stopped: threading.Event) -> None:
        if not stopped.wait(self.kill_after_s):
            for victim in victims:
                target.signal(victim, signal.SIGKILL)


def socket_folder(node: Node) -> Path:
    """Where sockets of a mesh lie whose links are files, as this process reaches it. Raises TargetError."""
    return ipc_folder(state_folder(node))


def sockets_in(folder: Path) -> list[Path]:
    """None where there is no such folder."""
    return sorted(path for path in folder.glob("*") if path.is_socket())


def remove(sockets: Path, state: Path, what: str) -> None:
    """Raises TargetError for what cannot be removed."""
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


def make_lose_files(parameters: Mapping[str, Any]) -> LoseFiles:
    """`what`: `sockets`, `folder` or `all`. `kill_after_s`: until the victims are killed, 0 for never."""
    given = Parameters(parameters)
    fault = LoseFiles(
        given.one_of("what", "sockets", ("sockets", "folder", "all")), given.number("kill_after_s", 2.0, 0.0, 60.0)
    )
    given.done()
    return fault
