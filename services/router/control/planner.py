"""Layers onto the stages of a pipeline, so that the slowest stage is as fast as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from common.errors import ConfigurationError
from common.topology import LayerRange


def balance_layers(
    layer_costs: Sequence[float], first_extra: float, last_extra: float, num_stages: int
) -> list[LayerRange]:
    """Contiguous ranges, one a stage, each of at least one layer, that minimise the most expensive stage.

    `first_extra` (embedding) and `last_extra` (final norm, lm_head) are added to the first and the last stage; all
    costs are in one unit and not negative. Among the plans with the same maximum, the most even one (least sum of
    squares) is taken, then the one with the lower starts. Raises ConfigurationError.
    """
    num_layers = len(layer_costs)
    if not 1 <= num_stages <= num_layers:
        raise ConfigurationError(
            f"{num_layers} layers cannot be cut into {num_stages} stages of at least one layer each"
        )
    if not all(math.isfinite(cost) and cost >= 0 for cost in (*layer_costs, first_extra, last_extra)):
        raise ConfigurationError("layer costs must be finite and not negative")
    cost_before = [0.0, *accumulate(layer_costs)]

    def stage_cost(stage: int, start: int, stop: int) -> float:
        cost = cost_before[stop] - cost_before[start]
        return cost + (first_extra if stage == 0 else 0.0) + (last_extra if stage == num_stages - 1 else 0.0)

    def stops(stage: int, start: int) -> range:
        """Where a stage may end: each later one needs a layer, and the last takes all that is left."""
        num_later = num_stages - 1 - stage
        return range(num_layers if num_later == 0 else start + 1, num_layers - num_later + 1)

    # Both tables: [stage][start] -> best over the stages from this one on, which cover layers [start, num_layers).
    # Two passes, because the least maximum and the least sum of squares do not compose in one.
    maximum = [[math.inf] * (num_layers + 1) for _ in range(num_stages + 1)]
    maximum[num_stages][num_layers] = 0.0
    for stage in reversed(range(num_stages)):
        for start in range(stage, num_layers):
            for stop in stops(stage, start):
                worst = max(stage_cost(stage, start, stop), maximum[stage + 1][stop])
                maximum[stage][start] = min(maximum[stage][start], worst)
    limit = maximum[0][0]

    squares = [[math.inf] * (num_layers + 1) for _ in range(num_stages + 1)]
    squares[num_stages][num_layers] = 0.0
    best_stop = [[0] * num_layers for _ in range(num_stages)]
    for stage in reversed(range(num_stages)):
        for start in range(stage, num_layers):
            for stop in stops(stage, start):  # ascending, so that the lower start of the next stage wins a tie
                cost = stage_cost(stage, start, stop)
                total = cost * cost + squares[stage + 1][stop]
                if cost <= limit and total < squares[stage][start]:
                    squares[stage][start], best_stop[stage][start] = total, stop

    ranges: list[LayerRange] = []
    start = 0
    for stage in range(num_stages):
        stop = best_stop[stage][start]
        ranges.append(LayerRange(start, stop))
        start = stop
    return ranges
