"""A node is paused and woken several times, at a pace that no time-out likes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Annotated

from chaos.faults.background import BackgroundFault
from chaos.faults.base import Range
from chaos.target import Node, Target


class Flap(BackgroundFault):
    """Each victim is paused `times` times for `off_s`, with `on_s` after each pause."""

    name = "flap"
    times: Annotated[int, Range(1, 100)] = 3
    off_s: Annotated[float, Range(0.01, 60)] = 0.5
    on_s: Annotated[float, Range(0.01, 60)] = 0.5

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            self._undo.add(target.signal, victim, signal.SIGCONT)
        # A busy machine is late.
        patience_s = self.times * (self.off_s + self.on_s) + 5
        self._begin(lambda: self._flap(target, victims), patience_s)

    def _flap(self, target: Target, victims: Sequence[Node]) -> None:
        for number, wait_s in ((signal.SIGSTOP, self.off_s), (signal.SIGCONT, self.on_s)) * self.times:
            for victim in victims:
                target.signal(victim, number)
            if self._stopped.wait(wait_s):
                return
