"""SIGTERM: the process may hand over what it has, and goes; it comes back when the fault is healed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.faults.background import BackgroundWork
from chaos.faults.parameters import Parameters
from chaos.target import Node, Target


@dataclass(slots=True)
class Stop:
    """`timeout_s`: time to leave in order, before SIGKILL. `comes_back`: a restart, at once."""

    timeout_s: float
    comes_back: bool
    name: str = "stop"
    needs: frozenset[str] = frozenset({"processes"})
    _ended: list[str] = field(default_factory=list)
    _work: BackgroundWork = field(default_factory=BackgroundWork)

    def unavailable(self, target: Target) -> str:
        return ""

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        self._ended += [victim.name for victim in victims]
        # Leaving in order takes its time, and streams are watched meanwhile.
        self._work.begin(lambda stopped: self._stop_all(target, victims))

    def heal(self, target: Target) -> None:
        self._work.finish(patience_s=self.timeout_s + 10)
        self._start_all(target)

    def _stop_all(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            target.stop(victim, self.timeout_s)
        if self.comes_back:
            self._start_all(target)

    def _start_all(self, target: Target) -> None:
        while self._ended:
            target.start(self._ended[-1])
            self._ended.pop()


def make_stop(parameters: Mapping[str, Any]) -> Stop:
    """`timeout_s`, 1 to 120."""
    taken = Parameters(parameters)
    timeout_s = taken.number("timeout_s", 20.0, 1, 120)
    taken.done()
    return Stop(timeout_s, comes_back=False)
