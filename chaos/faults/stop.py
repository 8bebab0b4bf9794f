"""A node is ended by SIGTERM: it may hand over what it has. It comes back when the fault is healed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from chaos.faults.background import BackgroundFault
from chaos.faults.base import Range
from chaos.target import Node, Target


class Stop(BackgroundFault):
    """Each victim gets `timeout_s` to leave in order, before SIGKILL."""

    name = "stop"
    comes_back: ClassVar[bool] = False
    timeout_s: Annotated[float, Range(1, 120)] = 20

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            self._undo.add(target.start, victim.name)
        # Leaving in order takes its time, and streams are watched meanwhile.
        self._begin(lambda: self._stop_all(target, victims), patience_s=self.timeout_s + 10)

    def _stop_all(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            target.stop(victim, self.timeout_s)
        if self.comes_back:
            self._undo.run()
