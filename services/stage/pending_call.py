"""One expert call of a stage until its sum is whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from common.array import Int64Array
from common.errors import MoemeshError
from common.messages import Header
from services.stage.dispatch import ExactSum, NodeRows, PartialSum
from services.stage.model.decoder import ExpertCall


@dataclass(slots=True, eq=False)
class PendingCall:
    """What is asked, of whom, and what has come back."""

    call: ExpertCall
    header: Header
    deadline_s: float
    sum: ExactSum | PartialSum
    started_s: float
    on_done: Callable[[Tensor], None]
    on_failed: Callable[[MoemeshError], None]
    parts: dict[int, NodeRows] = field(default_factory=dict)
    """Asked and not answered, by number of the message."""
    homeless: list[Int64Array] = field(default_factory=list)
    """Pairs that no usable node holds now."""
    refused_by: set[int] = field(default_factory=set)
    """Nodes that did not take this call: they are asked again only when nobody else is left."""
    refusals: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether every pair has come back."""
        return not self.parts and not self.homeless

    def header_now(self, now_s: float) -> Header:
        """The step's counters with this call's layer and the time that is left."""
        step = self.header
        return Header(
            router_term=step.router_term,
            generation=step.generation,
            attempt=step.attempt,
            step=step.step,
            layer=self.call.layer,
            time_left_ms=max(1, int((self.deadline_s - now_s) * 1000)),
            trace=step.trace,
        )
