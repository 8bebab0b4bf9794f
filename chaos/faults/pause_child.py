"""A child of a node is stopped by SIGSTOP: a rank of a stage is there, does nothing, and the others wait for it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence

from chaos.faults.kill_child import KillChild, newest_children
from chaos.target import Node, Target


class PauseChild(KillChild):
    """As `kill_child`, but the child stands still until it is healed, unless the victim has ended it meanwhile."""

    name = "pause_child"

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for child in newest_children(victims):
            self._undo.add(_wake, child)
            os.kill(child, signal.SIGSTOP)


def _wake(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
