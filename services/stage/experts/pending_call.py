"""One expert call of a stage until its sum is whole: which pairs are missing, and which nodes were asked for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from common.messages import Header
from common.wire.array import BoolArray, Float64Array, Int64Array
from services.stage.experts.dispatch import ExactSum, NodeRows, PartialSum
from services.stage.experts.rings import RingCall
from services.stage.model.decoder import ExpertCall

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0
"""A refusal costs a round trip, and what it is about (shards on their way, a placement) takes seconds."""


@dataclass(frozen=True, slots=True, eq=False)
class AskedPart:
    """Rows that one node was asked for and has not answered."""

    number: int
    """The number of the message that asks."""
    pending: PendingCall
    """What they are part of."""
    rows: NodeRows
    asked_s: float
    is_hedge: bool
    """Another node was asked for them before, and owes them still."""
    ring: RingCall | None = None
    """What they were asked with through a ring; None: by a message."""
    ring_index: int = 0


@dataclass(slots=True)
class _Pause:
    """A node that did not take the call."""

    times: int = 0
    until_s: float = 0.0


@dataclass(slots=True, eq=False)
class PendingCall:
    """What is asked, of which nodes, and what has come back. A pair may be asked of several nodes; it is taken once."""

    number: int
    call: ExpertCall
    header: Header
    deadline_s: float
    num_slices: int
    sum: ExactSum | PartialSum
    started_s: float
    degraded_rows: set[int] = field(default_factory=set)
    """Token rows that do without an expert."""
    num_retried: int = 0
    """How often another node was asked too, or instead."""
    is_mixed: bool = False
    """A node of another numeric class than the layer's first one was asked."""
    parts: dict[int, AskedPart] = field(default_factory=dict)
    """Asked and not answered, by number of the message."""
    pauses: dict[int, _Pause] = field(default_factory=dict)
    """Nodes that did not take this call: each is asked again after a pause that grows."""
    last_refusal: str = ""
    """What the last of them said."""
    unassigned_since_s: float | None = None
    """The time since which some pairs have no usable node; None: all have one."""
    look_again_s: float = float("inf")
    """There is nothing to hedge before that."""
    missing: BoolArray = field(init=False)
    """[pairs]: not come back yet."""
    asked_s: Float64Array = field(init=False)
    """[pairs]: when a node was last asked."""

    def __post_init__(self) -> None:
        num_pairs = self.call.experts.numel() * self.num_slices
        self.missing = np.ones(num_pairs, dtype=np.bool_)
        self.asked_s = np.zeros(num_pairs)

    @property
    def is_whole(self) -> bool:
        """Returns whether every pair has come back or is left out."""
        return not self.missing.any()

    def uncovered(self) -> Int64Array:
        """Returns the pairs that are missing and that no node owes."""
        mask = self.missing.copy()
        for part in self.parts.values():
            mask[part.rows.pairs] = False
        return np.flatnonzero(mask)

    def overdue(self, part: AskedPart, before_s: float) -> Int64Array:
        """Returns the pairs of a part that are missing, and that no node was asked for after `before_s`."""
        pairs = part.rows.pairs
        return pairs[self.missing[pairs] & (self.asked_s[pairs] <= before_s)]

    def unask(self, part: AskedPart) -> None:
        """A part that is no longer among `parts` will not be answered: its pairs were last asked of those that still
        owe them, so that they are as late as with those alone."""
        asked_s = np.zeros(self.missing.size)
        for other in self.parts.values():
            pairs = other.rows.pairs
            asked_s[pairs] = np.maximum(asked_s[pairs], other.asked_s)
        self.asked_s[part.rows.pairs] = asked_s[part.rows.pairs]
        self.look_again_s = 0.0

    def pause(self, node: int, now_s: float) -> None:
        """Notes that a node did not take this call: others are to be asked, and this one again after a while."""
        pause = self.pauses.setdefault(node, _Pause())
        pause.until_s = now_s + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**pause.times)
        pause.times += 1

    def pausing(self, now_s: float) -> set[int]:
        """Returns the nodes that are not to be asked yet."""
        return {node for node, pause in self.pauses.items() if now_s < pause.until_s}

    def owed_by(self, pairs: Int64Array) -> set[int]:
        """Returns the nodes that owe any of these pairs."""
        mask = np.zeros(self.missing.size, dtype=np.bool_)
        mask[pairs] = True
        return {part.rows.node for part in self.parts.values() if mask[part.rows.pairs].any()}

    def accept(self, part: NodeRows, rows: Tensor) -> None:
        """Uses what is new in an answer to a part that is no longer among `parts`."""
        self.sum.add(part, rows, self.missing[part.pairs])
        self.missing[part.pairs] = False

    def pointless(self) -> list[AskedPart]:
        """Returns the parts whose answers cannot be used any more, since others answered."""

        def is_usable(part: AskedPart) -> bool:
            left = self.missing[part.rows.pairs]
            return bool(left.any() if self.sum.takes_some_pairs else left.all())

        return [part for part in self.parts.values() if not is_usable(part)]

    def leave_out(self, pairs: Int64Array) -> int:
        """Goes on without these pairs (combine mode `exact` only). Returns how many token rows that concerns."""
        assert isinstance(self.sum, ExactSum)
        self.missing[self.sum.leave_out(pairs)] = False
        rows = np.unique(pairs // (self.call.experts.shape[1] * self.num_slices)).tolist()
        self.degraded_rows.update(rows)
        return len(rows)

    def header_now(self, now_s: float) -> Header:
        """Returns the step's counters with this call's layer and the time that is left."""
        left_ms = max(1, int((self.deadline_s - now_s) * 1000))
        of_step = self.header
        return Header(  # `replace` takes four times as long, at each call of each layer
            of_step.router_term,
            of_step.generation,
            of_step.attempt,
            of_step.step,
            self.call.layer,
            of_step.sequence_number,
            left_ms,
            of_step.trace,
        )
