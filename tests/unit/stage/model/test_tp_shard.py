"""Which part of the weights a rank has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError
from services.stage.model.tp_shard import MAX_DEGREE, TpShard, best_degree, check_degree
from tests.support.router.mesh_shapes import small_model

MODEL = replace(small_model(), num_heads=12, num_kv_heads=4, hidden_size=48, dense_intermediate_size=36)
DENSE = replace(MODEL, moe_layers=(False, *MODEL.moe_layers[1:]))


@given(degree=st.integers(1, MAX_DEGREE), size=st.integers(1, 200))
def test_parts_cover_an_axis_once_and_have_one_size(degree: int, size: int) -> None:
    parts = [TpShard(rank, degree).padded(size) for rank in range(degree)]
    assert [part.start for part in parts] == [0, *[part.stop for part in parts[:-1]]]
    assert parts[-1].stop >= size
    assert len({part.stop - part.start for part in parts}) == 1


@pytest.mark.parametrize(
    ("num_kv_heads", "degree", "heads"),
    [(4, 2, [(0, 2), (2, 4)]), (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]), (1, 2, [(0, 1), (0, 1)])],
)
def test_ranks_beyond_the_kv_heads_share_them_in_order(
    num_kv_heads: int, degree: int, heads: list[tuple[int, int]]
) -> None:
    cuts = [TpShard(rank, degree).kv_heads(num_kv_heads) for rank in range(degree)]
    assert [(cut.start, cut.stop) for cut in cuts] == heads


@pytest.mark.parametrize(
    ("degree", "sentence"),
    [
        (5, "TP=5 does not divide this model's query heads, 12"),
        (3, "TP=3 neither divides this model's 4 key/value heads nor is a multiple of them"),
        (17, "TP=17: a stage has at most 16 ranks"),
    ],
)
def test_a_degree_that_cannot_be_is_refused_with_the_numbers(degree: int, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        check_degree(MODEL, degree)


def test_only_a_model_with_dense_layers_needs_their_width_divided() -> None:
    check_degree(replace(MODEL, dense_intermediate_size=37), 2)
    with pytest.raises(ConfigurationError, match="TP=2 does not divide this model's width of its dense layers, 37"):
        check_degree(replace(DENSE, dense_intermediate_size=37), 2)


@pytest.mark.parametrize(("num_ranks", "degree"), [(1, 1), (2, 2), (3, 2), (4, 4), (11, 4), (12, 12)])
def test_the_best_degree_is_the_highest_that_the_model_allows(num_ranks: int, degree: int) -> None:
    assert best_degree(MODEL, num_ranks) == degree


def test_one_rank_adds_nothing_whatever_the_operator_chose() -> None:
    assert not TpShard(reduce="fast").adds_partial_sums
    assert TpShard(1, 2, "fast").adds_partial_sums
    assert not TpShard(1, 2).adds_partial_sums
