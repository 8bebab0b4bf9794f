"""No new ring can be made: there is no room for its memory, or no way to the node that is to take it."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from chaos.faults.background import BackgroundFault
from chaos.faults.rings import rings_folder, rings_of
from chaos.target import Node, Target, TargetError

LOOK_S = 0.05
"""How often sockets are looked for that have been made again."""


class DenyRings(BackgroundFault):
    """Where `what` is `memory`, no victim may make a file, memory without a name included, of the size of a ring. Where
    it is `names`, a folder is put in the place of each socket at which nodes there wait for rings. Then the expert
    nodes among the victims are killed: those after them need new rings. Healed, new ones are made."""

    name = "deny_rings"
    what: Literal["memory", "names"] = "memory"

    def can_hurt(self, node: Node) -> bool:
        return bool(rings_of(node))

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        rings = [ring for victim in victims for ring in rings_of(victim)]
        if not rings:
            raise TargetError(f"{', '.join(victim.name for victim in victims)}: no ring is mapped there")
        if self.what == "names":
            folders = [self._opened(folder) for folder in {rings_folder(victim) for victim in victims}]
            self._block(folders)
            self._begin(lambda: self._block_again(folders), patience_s=0.0)
        else:
            try:
                least_bytes = min(ring.num_bytes for ring in rings)
                for pid in {ring.pid for ring in rings}:
                    self._limit(pid, least_bytes - 1)
            except OSError as error:
                raise TargetError(f"the files of {victims[0].name} cannot be limited: {error.strerror}") from None
        for victim in victims:
            if victim.kind == "expert":
                target.signal(victim, signal.SIGKILL)

    def _limit(self, pid: int, num_bytes: int) -> None:
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        if limits[0] != resource.RLIM_INFINITY and limits[0] <= num_bytes:
            return  # by another such fault, which also lifts it
        self._undo.add(_restore, pid, limits)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, limits[1]))

    def _opened(self, folder: Path) -> Path:
        """Returns a path of the folder that stays when the process is gone through which it was reached."""
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise TargetError(f"{folder}: {error.strerror}") from None
        self._undo.add(os.close, descriptor)
        return Path(f"/proc/self/fd/{descriptor}")

    def _block_again(self, folders: Sequence[Path]) -> None:
        while not self._stopped.wait(LOOK_S):
            self._block(folders)

    def _block(self, folders: Sequence[Path]) -> None:
        for path in (path for folder in folders for path in folder.glob("*-rings") if path.is_socket()):
            with suppress(OSError):  # it has been made again, or is gone with its node
                path.unlink(missing_ok=True)
                path.mkdir()
                self._undo.add(_remove, path)


def _restore(pid: int, limits: tuple[int, int]) -> None:
    with suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.rmdir()
