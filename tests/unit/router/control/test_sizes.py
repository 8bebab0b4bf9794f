"""Bytes of a role, from shapes, and the cache that is left."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CapacityError, ConfigurationError
from common.topology import LayerRange
from services.router.control.sizes import StageSizes, balance_layers, plan_layers, shard_bytes
from tests.support.router.mesh_shapes import PLENTY, SHARD_BYTES, small_mesh, small_model

ATTENTION = 64 * 16 * (2 * 4 + 2 * 2) + 2 * 64
MOE_LAYER = ATTENTION + 3 * 64
EMBEDDING = 100 * 64
BLOCK_BYTES = 2 * 2 * 16 * 32 * 4
"""Of one layer."""


def test_layers_are_cut_so_that_the_end_with_the_lm_head_gets_fewer() -> None:
    ranges = plan_layers(small_model(num_hidden_layers=7, vocab_size=5000), 3)
    assert [stop - start for start, stop in ranges] == [3, 3, 1]
    assert ranges[0].start == 0
    assert ranges[-1].stop == 7


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="PP=5: 4 layers cannot be cut into 5 stages"):
        plan_layers(small_model(), 5)


def test_the_first_stage_pays_for_the_embedding_and_the_last_for_the_lm_head() -> None:
    sizes = StageSizes(small_model(), small_mesh(pp=3), ranges(0, 1, 3, 4))
    weights = [sizes.weight_bytes(slot) for slot in range(3)]
    assert weights == [4 * (MOE_LAYER + EMBEDDING), 4 * 2 * MOE_LAYER, 4 * (MOE_LAYER + EMBEDDING)]


def test_one_stage_alone_pays_for_both() -> None:
    size = StageSizes(small_model(), small_mesh(pp=1, item_bytes=2), ranges(0, 4)).weight_bytes(0)
    assert size == 2 * (4 * MOE_LAYER + 2 * EMBEDDING)


def test_a_dense_layer_counts_its_own_ffn() -> None:
    size = StageSizes(small_model(mlp_only_layers=[1]), small_mesh(pp=3), ranges(0, 1, 2, 4)).weight_bytes(1)
    assert size == 4 * (ATTENTION + 3 * 64 * 48)


@pytest.mark.parametrize(("num_slices", "width"), [(1, 32), (2, 16), (3, 11), (32, 1)])
def test_a_shard_is_as_large_as_its_widest_slice(num_slices: int, width: int) -> None:
    assert shard_bytes(small_model(), small_mesh(num_slices=num_slices)) == SHARD_BYTES * width // 32


def test_slices_of_no_width_are_refused_by_the_setting() -> None:
    with pytest.raises(ConfigurationError, match="EXPERT_SLICES=33: the experts of this model are 32 wide"):
        shard_bytes(small_model(), small_mesh(num_slices=33))


def test_the_pool_is_what_was_wished_where_memory_allows_it() -> None:
    spans, capacities = plan_layers(small_model(), 2), {0: PLENTY, 1: PLENTY}
    assert StageSizes(small_model(), small_mesh(), spans).pool_blocks(capacities) == 32
    assert StageSizes(small_model(), small_mesh(kv_cache_tokens=1025), spans).pool_blocks(capacities) == 33


def test_the_pool_is_what_the_tightest_slot_has_room_for() -> None:
    sizes = StageSizes(small_model(), small_mesh(), ranges(0, 2, 4))
    weights = sizes.weight_bytes(1)
    assert sizes.pool_blocks({0: PLENTY, 1: weights + 2 * 6 * BLOCK_BYTES}) == 5
    assert sizes.pool_blocks({0: PLENTY, 1: weights + 2 * 7 * BLOCK_BYTES - 1}) == 5


def test_a_slot_without_room_for_a_single_block_is_named_with_the_numbers() -> None:
    sizes = StageSizes(small_model(), small_mesh(), ranges(0, 2, 4))
    weights = sizes.weight_bytes(1)
    said = f"slot 1 needs {weights} bytes of weights and {2 * BLOCK_BYTES} per KV block"
    with pytest.raises(CapacityError, match=said):
        sizes.pool_blocks({0: PLENTY, 1: weights + 2 * BLOCK_BYTES - 1})
    assert list(sizes.too_small({0: PLENTY, 1: weights + 2 * BLOCK_BYTES - 1})) == [1]


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


def test_a_tier_has_what_the_budget_and_the_tightest_slot_leave_beside_the_pool() -> None:
    spans = plan_layers(small_model(), 2)
    sizes = StageSizes(small_model(), small_mesh(session_cache_bytes=10 * BLOCK_BYTES), spans)
    first, last = sizes.block_bytes(0), sizes.block_bytes(1)
    assert first > last, "it has a log"
    assert sizes.tier_slots({0: PLENTY, 1: PLENTY}, 32) == 10 * BLOCK_BYTES // first
    tight = sizes.weight_bytes(0) + 33 * first + 2 * first
    assert sizes.tier_slots({0: tight, 1: PLENTY}, 32) == 2
    assert sizes.tier_slots({0: tight - 1, 1: PLENTY}, 32) == 1
    assert sizes.tier_slots({0: sizes.weight_bytes(0), 1: PLENTY}, 32) == 0
    assert StageSizes(small_model(), small_mesh(), spans).tier_slots({0: PLENTY, 1: PLENTY}, 32) == 0
