"""More or fewer processes of a kind; healing brings back as many as there were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.faults.background import BackgroundWork
from chaos.faults.parameters import Parameters
from chaos.target import Node, Target, TargetError


@dataclass(slots=True)
class Scale:
    """By `change` processes of `kind`; the suite's victims do not matter."""

    kind: str
    change: int
    name: str = "scale"
    needs: frozenset[str] = frozenset({"processes"})
    _count_before: int | None = None
    _work: BackgroundWork = field(default_factory=BackgroundWork)

    def unavailable(self, target: Target) -> str:
        return ""

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        count = sum(node.kind == self.kind for node in target.nodes())
        if count + self.change < 1:
            raise TargetError(f"{count} processes of kind {self.kind} cannot become {count + self.change}")
        self._count_before = count
        self._work.begin(lambda stopped: target.scale(self.kind, count + self.change))

    def heal(self, target: Target) -> None:
        self._work.finish(patience_s=60.0)
        if self._count_before is not None:
            target.scale(self.kind, self._count_before)
            self._count_before = None


def make_scale(parameters: Mapping[str, Any]) -> Scale:
    """`kind`: stage or expert; `change`: -16 to 16, not 0."""
    taken = Parameters(parameters)
    made = Scale(taken.one_of("kind", "expert", ("stage", "expert")), taken.whole("change", 1, -16, 16))
    taken.done()
    if made.change == 0:
        raise ValueError("change=0 changes nothing")
    return made
