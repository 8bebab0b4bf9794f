"""How long a step takes by how many rows it has: from the bytes that they read, corrected by what was measured. Pure.

A row more reads the experts that no other row of its step needs. That gives the shape of the curve; the machine gives
its height, and what else the shape does not know. A measured time is compared with the shape at its size, and that
ratio holds for sizes nearby until they are measured too. Times are counted in steps, not seconds: so what it costs to
measure anew is a share of all steps, whatever a step takes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from enum import Enum

from common.checkpoint.model_config import ModelConfig

OVERHEAD = 0.2
"""Of a step of one row, its share of reading weights being 1: what it takes however many rows it has."""
COMPUTING = 0.05
"""The same: what a row takes that reads nothing new. A core reads a byte in the time of some 20 operations."""
AHEAD_SAVES = 0.07
"""What a step is shorter by that was planned ahead, as long as that is not measured."""
MEASURES_KEPT = 8
SHARE_AVERAGED = 0.75
"""So many of a size's measures, the shortest, are averaged: stalls are left out. Of steps that are answered faster than
the router looks, some seem to take no time and others twice their own; together they take what they do."""
SHORTEST_S = 1e-6
NEXT_SIZES, ANY_SIZE = 1, 1 << 30
"""How many sizes away a measure may be that stands for one."""


class Manner(Enum):
    """How a step came about, besides its size."""

    PLAIN = "plain"
    """Without drafts, planned when the step before it was answered."""
    AHEAD = "ahead"
    """Without drafts, planned before that."""
    DRAFTED = "drafted"


STEPS_A_MEASURE = {Manner.PLAIN: 100, Manner.AHEAD: 100, Manner.DRAFTED: 400}
"""For so many steps each measure of a size makes its measures last: several of them are not thrown away as soon as one,
which may have been a stall. Where drafts lose, they are tried again when their last measure has gone: with rows that
are many times as dear as believed, that must be rare."""
FORGOTTEN_AFTER_MEASURES = 8
"""A measure itself is forgotten after so many times that."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step reads, in numbers of weights."""

    num_experts: int
    """Of a layer."""
    num_experts_per_token: int
    weights_per_expert: int
    """Of all layers that have experts, one expert of each."""
    other_weights: int
    """What each step reads: attention, gates, dense layers, lm_head."""

    def weights(self, num_rows: int) -> float:
        """Returns how many distinct weights a step of so many rows is expected to read, if routing is random."""
        missed = 1 - self.num_experts_per_token / self.num_experts
        return self.other_weights + self.num_experts * (1 - missed**num_rows) * self.weights_per_expert

    def relative_time(self, num_rows: int) -> float:
        """Returns about how long it takes, where reading for one row takes 1."""
        return OVERHEAD + self.weights(num_rows) / self.weights(1) + COMPUTING * (num_rows - 1)


def step_shape(config: ModelConfig) -> StepShape:
    """Returns what steps of a model read."""
    moe_layers = len(config.moe_layer_indices)
    stages = sum(config.layer_parameters_on_stage(layer) for layer in range(config.num_layers))
    return StepShape(
        config.num_experts,
        config.num_experts_per_token,
        moe_layers * config.expert_parameters(),
        stages + config.embedding_parameters(),
    )


class StepTimes:
    """What was measured of one pipeline. Only steps that had it to themselves are a measure."""

    def __init__(self, shape: StepShape) -> None:
        self._shape = shape
        self._num_steps = 0
        self._measures: dict[Manner, dict[int, _Measures]] = {manner: {} for manner in Manner}
        """By size (see `_bucket`)."""

    @property
    def knows_drafts(self) -> bool:
        """Says whether a step with drafts, of whatever size, was measured lately."""
        return self._height(Manner.DRAFTED, 1) is not None

    def note(self, manner: Manner, num_rows: int, seconds: float) -> None:
        """Notes how long a step of so many rows took, from the answer to the one before it to its own."""
        self._num_steps += 1
        measures = self._measures[manner].setdefault(_bucket(num_rows), _Measures(STEPS_A_MEASURE[manner]))
        measures.add(self._num_steps, max(SHORTEST_S, seconds) / self._shape.relative_time(num_rows))

    def undrafted_s(self, num_rows: int) -> float | None:
        """Returns how long a step of so many rows takes that drafts nothing, planned ahead where that is done; None if
        that has not been measured lately: then a step without drafts is worth more than one with them."""
        relative = self._shape.relative_time(num_rows)
        if (height := self._height(Manner.AHEAD, num_rows, NEXT_SIZES)) is not None:
            return height * relative
        if (height := self._height(Manner.PLAIN, num_rows, NEXT_SIZES)) is not None:
            return height * relative * (1 - AHEAD_SAVES)
        return None

    def drafted_s(self, num_rows: int) -> float:
        """Returns how long a step of so many rows takes, with drafts. It is asked where `undrafted_s` is known."""
        height = self._height(Manner.DRAFTED, num_rows)
        if height is None:
            height = self._height(Manner.PLAIN, num_rows)
        if height is None:
            ahead = self._height(Manner.AHEAD, num_rows)
            assert ahead is not None, "an undrafted step was measured"
            height = ahead / (1 - AHEAD_SAVES)
        return height * self._shape.relative_time(num_rows)

    def _height(self, manner: Manner, num_rows: int, distance: int = ANY_SIZE) -> float | None:
        """Returns the height of the curve at the nearest size that was measured lately, and is not further off."""
        size, nearest = _bucket(num_rows), None
        for bucket, measures in self._measures[manner].items():
            if abs(bucket - size) <= distance and self._num_steps <= measures.last_until_step:
                nearest, distance = measures, abs(bucket - size) - 1
        return None if nearest is None else nearest.height


class _Measures:
    """The latest measures of one size."""

    def __init__(self, steps_a_measure: int) -> None:
        self._steps_a_measure = steps_a_measure
        self._steps_heights: deque[tuple[int, float]] = deque(maxlen=MEASURES_KEPT)
        self.height = 0.0
        """Seconds over the relative time of the size."""
        self.last_until_step = 0

    def add(self, step: int, height: float) -> None:
        """Adds one; steps are numbered in the order of all that were noted."""
        latest = self._steps_heights
        latest.append((step, height))
        while step - latest[0][0] >= FORGOTTEN_AFTER_MEASURES * self._steps_a_measure:
            latest.popleft()
        shortest = sorted(each for _, each in latest)[: max(1, int(SHARE_AVERAGED * len(latest)))]
        self.height = statistics.fmean(shortest)
        self.last_until_step = step + self._steps_a_measure * len(latest)


def _bucket(num_rows: int) -> int:
    """Returns the number of a size: each of the first few by itself, then eight for each doubling."""
    return num_rows if num_rows <= 8 else math.floor(8 * math.log2(num_rows)) - 16
