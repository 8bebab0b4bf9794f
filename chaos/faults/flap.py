"""There and away again, several times: a node that is paused and woken at a pace that no time-out likes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.faults.background import BackgroundWork
from chaos.faults.parameters import Parameters
from chaos.target import Node, Target


@dataclass(slots=True)
class Flap:
    """`times` pauses of `off_s`, with `on_s` between them."""

    times: int
    off_s: float
    on_s: float
    name: str = "flap"
    needs: frozenset[str] = frozenset({"processes"})
    _victims: tuple[Node, ...] = ()
    _work: BackgroundWork = field(default_factory=BackgroundWork)

    def unavailable(self, target: Target) -> str:
        return ""

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        self._victims = tuple(victims)
        self._work.begin(lambda stopped: self._flap(target, stopped))

    def heal(self, target: Target) -> None:
        try:
            self._work.finish(patience_s=self.times * (self.off_s + self.on_s) + 5.0)  # a busy machine is late
        finally:
            for victim in self._victims:
                target.signal(victim, signal.SIGCONT)
            self._victims = ()

    def _flap(self, target: Target, stopped: threading.Event) -> None:
        for _ in range(self.times):
            for number, wait_s in ((signal.SIGSTOP, self.off_s), (signal.SIGCONT, self.on_s)):
                for victim in self._victims:
                    target.signal(victim, number)
                if stopped.wait(wait_s):
                    return


def make_flap(parameters: Mapping[str, Any]) -> Flap:
    """`times` 1 to 100, `off_s` and `on_s` 0.01 to 60."""
    taken = Parameters(parameters)
    made = Flap(
        taken.whole("times", 3, 1, 100), taken.number("off_s", 0.5, 0.01, 60), taken.number("on_s", 0.5, 0.01, 60)
    )
    taken.done()
    return made
