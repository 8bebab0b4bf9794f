"""The kernels that choose tokens: always the token that the rules choose, and the rules are seldom asked."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.stage.model import sampling
from services.stage.model.logit_adjustments import LogitAdjustments
from services.stage.model.micro_batch import SamplingColumns
from services.stage.model.sampling import choose_by_rules, sample
from tests.support.nodes.kernels import kernels_for, one_torch_thread

__all__ = ["one_torch_thread"]
MAX_VOCABULARY = 200_000
ROWS = 4
KINDS = (
    "as they come",
    "all equal",
    "one far above",
    "hardly any possible",
    "whole numbers",
    "ascending",
    "descending",
    "huge",
    "some of no use",
)


def logits_of(kind: str, vocab_size: int, scale: float, draw: np.random.Generator) -> Tensor:
    """float32 [ROWS, V]."""
    logits = draw.standard_normal((ROWS, vocab_size)).astype(np.float32) * np.float32(scale)
    if kind == "all equal":
        logits[:] = logits[:, :1]
    elif kind == "one far above":  # by about what noise can make up for
        logits[:, draw.integers(0, vocab_size)] += 12
    elif kind == "hardly any possible":
        logits[draw.random(logits.shape) < 0.95] = -np.inf
    elif kind == "whole numbers":
        logits = np.round(logits)
    elif kind in ("ascending", "descending"):
        logits.sort(axis=1)
        logits = logits if kind == "ascending" else logits[:, ::-1].copy()
    elif kind == "huge":
        logits *= np.float32(1e30)
    elif kind == "some of no use":
        logits[draw.random(logits.shape) < 0.02] = draw.choice([np.nan, np.inf, -np.inf])
    return torch.from_numpy(logits)


def columns_of(draw: np.random.Generator, min_ps: list[float] | None = None, **values: Any) -> SamplingColumns:
    """ROWS rows, with these values where given; the rest of each row is drawn."""
    filled: dict[str, Any] = {
        "sequence_ids": np.arange(ROWS),
        "positions": draw.integers(0, 1 << 31, ROWS),
        "temperatures": np.ones(ROWS),
        "top_ps": np.ones(ROWS),
        "top_ks": np.zeros(ROWS, dtype=np.int64),
        "num_top_logprobs": np.full(ROWS, -1),
        "seeds": draw.integers(0, (1 << 63) - 1, ROWS),
        "choices": draw.integers(0, 5, ROWS),
    }
    filled |= {name: np.array(each, dtype=filled[name].dtype) for name, each in values.items()}
    if min_ps is not None:
        off = np.zeros(ROWS)
        nothing = np.zeros((0, 4), dtype=np.int32), np.zeros((0, 2), dtype=np.int64), np.zeros(0)
        filled["adjustments"] = LogitAdjustments(np.array(min_ps), off, off, off + 1, *nothing)
    return SamplingColumns(**filled)


def assert_same(logits: Tensor, columns: SamplingColumns, threads: int = 1) -> None:
    chosen = sample(logits, columns, kernels_for("native", threads)).token_ids.tolist()
    assert chosen == choose_by_rules(logits, columns, np.arange(ROWS)).tolist()


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_kernels_choose_what_the_rules_choose(data: st.DataObject) -> None:
    def column(values: Any) -> list[Any]:
        drawn: list[Any] = data.draw(st.lists(values, min_size=ROWS, max_size=ROWS))
        return drawn

    draw = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    vocab_size = data.draw(st.one_of(st.integers(1, 300), st.sampled_from([8191, 8192, 30_000])))
    kind, scale = data.draw(st.sampled_from(KINDS)), 10.0 ** data.draw(st.floats(-3, 3))
    columns = columns_of(
        draw,
        column(st.sampled_from([0.0, 0.0, 0.05, 0.9, 1.0])) if data.draw(st.booleans()) else None,
        temperatures=column(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-30, 3).map(lambda x: 10.0**x))),
        top_ps=column(st.one_of(st.just(1.0), st.floats(0, 1), st.sampled_from([1e-9, 1 - 1e-12]))),
        top_ks=column(st.one_of(st.just(0), st.integers(1, vocab_size + 1), st.integers(1, 60))),
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    assert_same(logits_of(kind, vocab_size, scale, draw).to(dtype), columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_choose_what_the_rules_choose_of_a_large_vocabulary(kind: str, dtype: torch.dtype) -> None:
    draw = np.random.default_rng(KINDS.index(kind))
    for vocab_size in (151_936, MAX_VOCABULARY):
        logits = logits_of(kind, vocab_size, 3.0, draw).to(dtype)
        for temperature in (1e-30, 1e-3, 0.7, 1.0, 1e3):
            assert_same(logits, columns_of(draw, temperatures=[temperature] * ROWS))
        assert_same(logits, columns_of(draw, top_ks=[0, 50, 20_000, 0], top_ps=[0.95, 1.0, 0.9, 0.5]))


def test_ten_thousand_rows_get_the_tokens_of_the_rules() -> None:
    draw = np.random.default_rng(0)
    for number in range(10_000 // ROWS):
        logits = logits_of(KINDS[number % 3], 8192, 10.0 ** draw.uniform(-1, 1), draw).to(torch.bfloat16)
        assert_same(logits, columns_of(draw, temperatures=10.0 ** draw.uniform(-1, 1, ROWS)))


def test_equal_tokens_are_cut_in_the_order_of_their_ids() -> None:
    draw = np.random.default_rng(0)
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0] * 40] * ROWS)
    for top_k in (1, 2, 3, 100, 119, 120, 121, 160, 161):
        for _ in range(30):
            assert_same(logits, columns_of(draw, top_ks=[top_k] * ROWS, top_ps=[1.0, 0.3, 0.7, 0.9999]))


def test_threads_change_no_token() -> None:
    draw = np.random.default_rng(0)
    logits = logits_of("as they come", 100_000, 3.0, draw)
    assert_same(logits, columns_of(draw, top_ps=[1.0, 1.0, 0.9, 0.5]), threads=3)


def test_rows_that_do_not_follow_each_other_in_memory_are_taken_as_they_are() -> None:
    draw = np.random.default_rng(0)
    wide = logits_of("as they come", 300, 3.0, draw)
    assert_same(wide[:, :200], columns_of(draw))
    assert_same(wide.T.contiguous().T, columns_of(draw))


def test_the_rules_are_asked_only_where_they_have_to_be() -> None:
    draw = np.random.default_rng(0)
    logits, kernels = logits_of("as they come", 8192, 3.0, draw).to(torch.bfloat16), kernels_for("native")
    columns = columns_of(draw, temperatures=[0.0, 0.7, 1.0, 1.0], top_ps=[1.0, 1.0, 0.9, 1.0], top_ks=[0, 0, 0, 50])
    equal = columns_of(draw, temperatures=[0.0, 1.0, 1e-30, 1.0])  # without noise, in effect: the first of the best
    with mock.patch.object(sampling, "choose_by_rules", wraps=choose_by_rules) as rules:
        sample(logits, columns, kernels)
        assert not rules.called
        sample(torch.zeros((ROWS, 10)) + 1, equal, kernels)
        assert rules.call_args.args[2].tolist() == [2]


@pytest.mark.parametrize("top_p", [-1e6, -1.0, -1e-9, 0.0])
def test_a_share_that_leaves_nothing_is_left_to_the_rules(top_p: float) -> None:
    draw = np.random.default_rng(3)
    for kind in ("whole numbers", "ascending"):  # the second time there is memory of the first
        assert_same(logits_of(kind, 300, 3.0, draw), columns_of(draw, top_ps=np.full(ROWS, top_p)))
