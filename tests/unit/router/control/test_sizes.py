"""Bytes of a role, from shapes, and the cache that is left."""

from __future__ import annotations

import pytest

from common.errors import CapacityError, ConfigurationError
from common.topology import LayerRange
from services.router.control.sizes import plan_layers, pool_blocks, shard_bytes, stage_weight_bytes
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
    with pytest.raises(ConfigurationError, match="4 layers cannot be cut into 5 stages"):
        plan_layers(small_model(), 5)


def test_the_first_stage_pays_for_the_embedding_and_the_last_for_the_lm_head() -> None:
    config, mesh = small_model(), small_mesh(pp=3)
    spans = [LayerRange(0, 1), LayerRange(1, 3), LayerRange(3, 4)]
    sizes = [stage_weight_bytes(config, mesh, slot, span) for slot, span in enumerate(spans)]
    assert sizes == [4 * (MOE_LAYER + EMBEDDING), 4 * 2 * MOE_LAYER, 4 * (MOE_LAYER + EMBEDDING)]


def test_one_stage_alone_pays_for_both() -> None:
    size = stage_weight_bytes(small_model(), small_mesh(pp=1, item_bytes=2), 0, LayerRange(0, 4))
    assert size == 2 * (4 * MOE_LAYER + 2 * EMBEDDING)


def test_a_dense_layer_counts_its_own_ffn() -> None:
    size = stage_weight_bytes(small_model(mlp_only_layers=[1]), small_mesh(pp=3), 1, LayerRange(1, 2))
    assert size == 4 * (ATTENTION + 3 * 64 * 48)


@pytest.mark.parametrize(("num_slices", "width"), [(1, 32), (2, 16), (3, 11), (32, 1)])
def test_a_shard_is_as_large_as_its_widest_slice(num_slices: int, width: int) -> None:
    assert shard_bytes(small_model(), small_mesh(num_slices=num_slices)) == SHARD_BYTES * width // 32


def test_slices_of_no_width_are_refused_by_the_setting() -> None:
    with pytest.raises(ConfigurationError, match="EXPERT_SLICES=33: the experts of this model are 32 wide"):
        shard_bytes(small_model(), small_mesh(num_slices=33))


def test_the_pool_is_what_was_wished_where_memory_allows_it() -> None:
    spans = plan_layers(small_model(), 2)
    assert pool_blocks(small_model(), small_mesh(), spans, [PLENTY, PLENTY]) == 32
    assert pool_blocks(small_model(), small_mesh(kv_cache_tokens=1025), spans, [PLENTY, PLENTY]) == 33


def test_the_pool_is_what_the_tightest_slot_has_room_for() -> None:
    config, mesh, spans = small_model(), small_mesh(), [LayerRange(0, 2), LayerRange(2, 4)]
    weights = stage_weight_bytes(config, mesh, 1, spans[1])
    assert pool_blocks(config, mesh, spans, [PLENTY, weights + 2 * 6 * BLOCK_BYTES]) == 5
    assert pool_blocks(config, mesh, spans, [PLENTY, weights + 2 * 7 * BLOCK_BYTES - 1]) == 5


def test_a_slot_without_room_for_a_single_block_is_named_with_the_numbers() -> None:
    config, mesh, spans = small_model(), small_mesh(), [LayerRange(0, 2), LayerRange(2, 4)]
    weights = stage_weight_bytes(config, mesh, 1, spans[1])
    with pytest.raises(
        CapacityError, match=f"slot 1 needs {weights} bytes of weights and {2 * BLOCK_BYTES} a KV block"
    ):
        pool_blocks(config, mesh, spans, [PLENTY, weights + 2 * BLOCK_BYTES - 1])
