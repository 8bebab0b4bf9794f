"""A node is stopped by SIGSTOP: it is there with open sockets and does nothing. SIGCONT wakes it up in another time."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from chaos.faults.base import Fault
from chaos.target import Node, Target


class Pause(Fault):
    """Each victim stands still until it is healed; the suite's `heal_after_s` says how long that is."""

    name = "pause"

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            self._undo.add(target.signal, victim, signal.SIGCONT)
            target.signal(victim, signal.SIGSTOP)
