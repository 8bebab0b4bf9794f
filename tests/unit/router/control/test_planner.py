from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.topology import LayerRange
from services.router.control.planner import balance_layers


def ranges(*starts_and_end: int) -> list[LayerRange]:
    return [LayerRange(a, b) for a, b in pairwise(starts_and_end)]


def test_layers_that_divide_are_dealt_out_evenly() -> None:
    assert balance_layers([1.0] * 6, 0.0, 0.0, 3) == ranges(0, 2, 4, 6)


def test_of_equal_maxima_the_most_even_plan_with_the_lowest_starts_is_taken() -> None:
    assert balance_layers([1.0] * 7, 0.0, 0.0, 3) == ranges(0, 2, 4, 7)


def test_embedding_and_lm_head_count() -> None:
    assert balance_layers([1.0] * 7, 2.0, 3.0, 3) == ranges(0, 2, 6, 7)


def test_every_stage_has_a_layer_however_large_the_head() -> None:
    assert balance_layers([1.0] * 3, 0.0, 100.0, 3) == ranges(0, 1, 2, 3)


def test_one_stage_takes_all() -> None:
    assert balance_layers([1.0, 2.0], 5.0, 5.0, 1) == ranges(0, 2)


@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_layers_is_refused_with_the_numbers(num_stages: int) -> None:
    with pytest.raises(ConfigurationError, match=f"3 layers cannot be cut into {num_stages} stages"):
        balance_layers([1.0] * 3, 0.0, 0.0, num_stages)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_cost_that_is_none_is_refused(cost: float) -> None:
    with pytest.raises(ConfigurationError, match="finite and not negative"):
        balance_layers([1.0, cost], 0.0, 0.0, 1)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(0, 30), st.integers(0, 30), st.integers(1, 9))
def test_no_other_cut_has_a_cheaper_worst_stage(costs: list[int], first: int, last: int, num_stages: int) -> None:
    if num_stages > len(costs):
        return

    def worst(plan: list[LayerRange]) -> int:
        stage_costs = [sum(costs[start:stop]) for start, stop in plan]
        stage_costs[0] += first
        stage_costs[-1] += last
        return max(stage_costs)

    plan = balance_layers(costs, first, last, num_stages)
    assert plan[0].start == 0
    assert plan[-1].stop == len(costs)
    assert all(a.stop == b.start for a, b in pairwise(plan))
    assert all(stage.start < stage.stop for stage in plan)
    cuts = combinations(range(1, len(costs)), num_stages - 1)
    assert worst(plan) == min(worst(ranges(0, *cut, len(costs))) for cut in cuts)
