"""A kind of node gets more or fewer processes; healing brings back as many as there were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from chaos.faults.background import BackgroundFault
from chaos.faults.base import Range
from chaos.target import Node, Target, TargetError


class Scale(BackgroundFault):
    """There are `change` processes of `kind` more than before, or fewer; the suite's victims do not matter."""

    name = "scale"
    kind: Literal["expert", "stage"] = "expert"
    change: Annotated[int, Range(-16, 16)] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.change == 0:
            raise ValueError("change=0 changes nothing")

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        count = sum(node.kind == self.kind for node in target.nodes())
        if count + self.change < 1:
            raise TargetError(f"{count} processes of kind {self.kind} cannot become {count + self.change}")
        self._undo.add(target.scale, self.kind, count)
        self._begin(lambda: target.scale(self.kind, count + self.change), patience_s=60.0)
