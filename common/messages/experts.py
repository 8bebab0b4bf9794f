"""Stage <-> expert node."""

from __future__ import annotations

from dataclasses import dataclass

from common.messages.frames import TensorFrame


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Stage -> expert node: one layer's rows for that node. Answer in the header's time: ExpertRows or Failed."""

    call: int
    """The stage's number for this call; echoed in the answer."""
    hidden: TensorFrame
    """model dtype [T, D], each token row once."""
    routing: TensorFrame
    """int32 [3, R]: row of `hidden`, expert, slice of each routed row; sorted by (expert, slice)."""
    weights: TensorFrame
    """float32 [R] gate weights for combine mode `partial`; [0] for `exact`."""


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Expert node -> stage. Exact: model dtype [R, D] as asked. Partial: float32 [T, D], weighted and summed."""

    call: int
    rows: TensorFrame
    compute_seconds: float
    """Time of the grouped FFN that this call was part of."""
    queue_seconds: float
    """Time between the call's arrival and the start of its FFN."""


@dataclass(frozen=True, slots=True)
class CancelCall:
    """Stage -> expert node: nobody waits for these calls any more; what still queues is dropped. Not answered."""

    calls: tuple[int, ...]
    """The stage's numbers; unknown ones are no error."""
