"""SIGSTOP: the process is there, its sockets are open, and it does nothing. SIGCONT: it wakes up in another time."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.target import Node, Target


@dataclass(slots=True)
class Pause:
    """Healed by SIGCONT to the very same processes."""

    name: str = "pause"
    needs: frozenset[str] = frozenset({"processes"})
    _paused: list[Node] = field(default_factory=list)

    def unavailable(self, target: Target) -> str:
        return ""

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            self._paused.append(victim)
            target.signal(victim, signal.SIGSTOP)

    def heal(self, target: Target) -> None:
        while self._paused:
            target.signal(self._paused[-1], signal.SIGCONT)
            self._paused.pop()


def make_pause(parameters: Mapping[str, Any]) -> Pause:
    """No parameters; how long is the suite's `heal_after_s`."""
    Parameters(parameters).done()
    return Pause()
