"""Dealing a call's rows out to nodes and adding up what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.stage.experts.dispatch import (
    WEIGHT_READ_ROWS,
    ExactSum,
    NodeRows,
    PartialSum,
    choose_copies,
    pair_weights,
    split_pairs,
)
from services.stage.model.decoder import ExpertCall
from tests.support.nodes.kernels import kernels_for, one_torch_thread

__all__ = ["one_torch_thread"]
WIDTH = 8


def split_all(call: ExpertCall, num_slices: int, *placement: Any) -> list[NodeRows]:
    """As `split_pairs` splits all pairs of a call."""
    return split_pairs(call, np.arange(call.experts.numel() * num_slices), num_slices, *placement)


@st.composite
def calls(draw: st.DrawFn) -> tuple[ExpertCall, int, int]:
    """A call, the number of experts, the number of slices."""
    num_experts = draw(st.integers(1, 7))
    num_choices = draw(st.integers(1, min(3, num_experts)))
    num_tokens = draw(st.integers(1, 9))
    picks = st.permutations(range(num_experts)).map(lambda order: order[:num_choices])
    experts = draw(st.lists(picks, min_size=num_tokens, max_size=num_tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    call = ExpertCall(
        3,
        torch.randn((num_tokens, WIDTH), generator=generator),
        torch.tensor(experts, dtype=torch.int64),
        torch.rand((num_tokens, num_choices), generator=generator),
    )
    return call, num_experts, draw(st.integers(1, 3))


@st.composite
def holders(draw: st.DrawFn, num_shards: int) -> list[list[int]]:
    """For each shard at least one node, in some order of preference."""
    nodes = st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True)
    return draw(st.lists(nodes, min_size=num_shards, max_size=num_shards))


def rows_of(call: ExpertCall, part: NodeRows, num_slices: int) -> torch.Tensor:
    """What a node answers: an expert's slice is a fixed linear map, so that slices add up to the expert."""
    hidden = call.hidden[torch.from_numpy(part.tokens)][torch.from_numpy(part.routing[0]).long()]
    scale = 1.0 + torch.from_numpy(part.routing[1]) + 10.0 * torch.from_numpy(part.routing[2])
    return hidden * scale[:, None] / num_slices


def reference(call: ExpertCall, num_slices: int) -> torch.Tensor:
    """Straight from the definition, in float64."""
    total = torch.zeros(call.hidden.shape, dtype=torch.float64)
    for token, (experts, weights) in enumerate(zip(call.experts.tolist(), call.weights.tolist(), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            for piece in range(num_slices):
                total[token] += weight * call.hidden[token].double() * (1.0 + expert + 10.0 * piece) / num_slices
    return total


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_pair_is_asked_exactly_once_and_of_a_node_that_holds_it(data: st.DataObject) -> None:
    call, num_experts, num_slices = data.draw(calls())
    copies = data.draw(holders(num_experts * num_slices))
    parts = split_all(call, num_slices, copies, {0: data.draw(st.integers(0, 50))})
    assert sorted(np.concatenate([part.pairs for part in parts]).tolist()) == list(
        range(call.experts.numel() * num_slices)
    )
    assert len({part.node for part in parts}) == len(parts)
    num_choices = call.experts.shape[1]
    for part in parts:
        rows, experts, slices = part.routing
        keys = (experts * num_slices + slices).tolist()
        assert keys == sorted(keys)
        assert all(part.node in copies[key] for key in keys)
        assert part.tokens.tolist() == sorted(set(part.tokens.tolist()))
        for pair, row, expert, piece in zip(part.pairs, rows, experts, slices, strict=True):
            token, choice = divmod(pair // num_slices, num_choices)
            assert part.tokens[row] == token
            assert call.experts[token, choice] == expert
            assert pair % num_slices == piece


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_exact_sum_is_the_same_whoever_answers_in_whatever_order_and_whatever_adds(data: st.DataObject) -> None:
    call, num_experts, num_slices = data.draw(calls())
    sums = []
    for kernels in (None, kernels_for("native")):
        copies = data.draw(holders(num_experts * num_slices))
        parts = split_all(call, num_slices, copies, {})
        total = ExactSum(call, num_slices, kernels)
        for part in data.draw(st.permutations(parts)):
            total.add(part, rows_of(call, part, num_slices))
        sums.append(total.total())
    assert torch.equal(*sums)
    assert torch.allclose(sums[0].double(), reference(call, num_slices), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_part_that_is_sent_again_elsewhere_fills_the_same_places(data: st.DataObject) -> None:
    call, num_experts, num_slices = data.draw(calls())
    num_shards = num_experts * num_slices
    parts = split_all(call, num_slices, data.draw(holders(num_shards)), {})
    lost = data.draw(st.sampled_from(parts))
    total = ExactSum(call, num_slices)
    for part in parts:
        if part is not lost:
            total.add(part, rows_of(call, part, num_slices))
    again = split_pairs(call, lost.pairs, num_slices, data.draw(holders(num_shards)), {})
    assert sorted(np.concatenate([part.pairs for part in again]).tolist()) == sorted(lost.pairs.tolist())
    for part in again:
        total.add(part, rows_of(call, part, num_slices))
    whole = ExactSum(call, num_slices)
    (one,) = split_all(call, num_slices, [[0]] * num_shards, {})
    whole.add(one, rows_of(call, one, num_slices))
    assert torch.equal(total.total(), whole.total())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_partial_sum_is_near_and_independent_of_the_order_of_answers(data: st.DataObject) -> None:
    call, num_experts, num_slices = data.draw(calls())
    parts = split_all(call, num_slices, data.draw(holders(num_experts * num_slices)), {})
    sums = []
    for order in (parts, data.draw(st.permutations(parts))):
        total = PartialSum(call)
        for part in order:
            weights = torch.from_numpy(pair_weights(call, part, num_slices))
            weighed = torch.zeros((part.tokens.size, WIDTH)).index_add_(
                0, torch.from_numpy(part.routing[0]), rows_of(call, part, num_slices) * weights[:, None]
            )
            total.add(part, weighed)
        sums.append(total.total())
    assert torch.equal(*sums)
    assert torch.allclose(sums[0].double(), reference(call, num_slices), rtol=1e-4, atol=1e-4)


def test_the_sum_is_made_in_float32_and_rounded_once() -> None:
    call = ExpertCall(
        0,
        torch.ones((1, 1), dtype=torch.bfloat16),
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[1.0, 1.0, 1.0]]),
    )
    (part,) = split_all(call, 1, [[0]] * 3, {})
    total = ExactSum(call, 1)
    # In bfloat16 256 + 1 is 256: added there, both ones would be lost.
    total.add(part, torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert total.total().dtype == torch.bfloat16
    assert total.total().item() == 258.0


def test_pairs_of_a_shard_without_a_usable_copy_are_left_out() -> None:
    call = ExpertCall(0, torch.ones((2, WIDTH)), torch.tensor([[0], [1]]), torch.ones((2, 1)))
    (part,) = split_all(call, 1, [[0], []], {})
    assert part.pairs.tolist() == [0]
    assert split_all(call, 1, [[], []], {}) == []


def choose(rows: dict[int, int], copies: Sequence[Sequence[int]], outstanding: dict[int, int] | None = None) -> Any:
    return choose_copies(rows, copies, outstanding or {})


def test_two_nodes_with_all_copies_share_a_calls_shards_equally() -> None:
    chosen = choose(dict.fromkeys(range(8), 1), [[0, 1]] * 8)
    assert sorted(chosen.values()) == [0] * 4 + [1] * 4


def test_the_first_copy_is_taken_where_all_else_is_equal() -> None:
    assert choose({0: 3}, [[4, 2]]) == {0: 4}


def test_a_node_that_lags_gets_less() -> None:
    chosen = choose(dict.fromkeys(range(6), 1), [[0, 1]] * 6, {0: 10 * WEIGHT_READ_ROWS})
    assert set(chosen.values()) == {1}


def test_the_busiest_shard_is_dealt_first() -> None:
    chosen = choose({0: 1, 1: 1, 2: 100}, [[0, 1]] * 3)
    assert chosen[0] == chosen[1] != chosen[2]


@given(
    rows=st.dictionaries(st.integers(0, 9), st.integers(1, 50), min_size=1),
    copies=st.lists(st.lists(st.integers(0, 4), min_size=1, unique=True), min_size=10, max_size=10),
)
@settings(deadline=None)
def test_every_shard_goes_to_one_of_its_copies(rows: dict[int, int], copies: list[list[int]]) -> None:
    chosen = choose(rows, copies)
    assert chosen.keys() == rows.keys()
    assert all(chosen[shard] in copies[shard] for shard in rows)


@pytest.mark.parametrize("by", ["torch", "native"])
def test_a_slice_that_is_left_out_takes_its_whole_expert_along_for_that_token(by: str) -> None:
    call = ExpertCall(
        0, torch.ones((2, WIDTH)), torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    )
    total = ExactSum(call, 2, kernels_for(by))
    for part in split_all(call, 2, [[0]] * 4, {}):
        total.add(part, torch.ones((part.pairs.size, WIDTH)))
    assert total.leave_out(np.array([3])).tolist() == [2, 3], "token 0, second choice, both slices"
    assert torch.allclose(total.total()[0], torch.full((WIDTH,), 2.0)), "all weight is on the expert that is left"
    assert torch.equal(total.total()[1], torch.full((WIDTH,), 2.0))


def test_only_the_fresh_rows_of_an_answer_are_taken() -> None:
    call = ExpertCall(0, torch.ones((1, WIDTH)), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    total = ExactSum(call, 1)
    (part,) = split_all(call, 1, [[0], [0]], {})
    total.add(part, torch.ones((2, WIDTH)))
    total.add(part, torch.full((2, WIDTH), 3.0), np.array([False, True]))
    assert torch.equal(total.total()[0], torch.full((WIDTH,), 2.0))
