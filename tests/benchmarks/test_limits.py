"""Limits against figures that were worked out by hand."""

from __future__ import annotations

import pytest

from tests.benchmarks.limits import (
    decode_limit,
    distinct_experts,
    prefill_flop,
    prefill_limit,
    prefill_s,
    step_weight_bytes,
)
from tests.benchmarks.make_bench_model import SIZES, BenchSizes

TINY = BenchSizes(
    layers=1, width=2, heads=1, head_width=2, kv_heads=1, experts=4, experts_per_token=1, expert_width=3, vocabulary=5
)


def test_one_stream_needs_its_own_experts_and_many_need_nearly_all() -> None:
    bench = SIZES["bench"]
    assert distinct_experts(bench, 1) == pytest.approx(4)
    # 32 (1 - (7/8)^4)
    assert distinct_experts(bench, 4) == pytest.approx(13.242, abs=1e-3)
    assert 31 < distinct_experts(bench, 32) < 32


def test_a_step_of_one_stream_reads_the_active_weights() -> None:
    # q 4, k 4, v 4, o 4, gate 8, one expert of 3 * 2 * 3, lm_head 10: 52 weights of two bytes.
    assert step_weight_bytes(TINY, 1) == pytest.approx(104)
    # `bench` has 82 M active parameters: 157 MiB.
    assert step_weight_bytes(SIZES["bench"], 1) / 2**20 == pytest.approx(157, abs=0.7)


def test_the_limit_of_decoding_grows_with_streams_by_less_than_their_number() -> None:
    bench = SIZES["bench"]
    limits = [decode_limit(bench, streams, 26.5e9) for streams in (1, 4, 16)]
    assert limits == pytest.approx([161, 278, 577], rel=0.01)


def test_a_prompt_costs_its_linears_for_each_token_and_attention_for_each_pair() -> None:
    flop = prefill_flop(TINY, 3)
    assert flop.linears == 2 * (3 * (24 + 18) + 10)
    # Six pairs, QK and PV, one head of width 2.
    assert flop.attention == 6 * 2 * 2 * 2
    assert prefill_limit(TINY, 3, 1e3) == pytest.approx(3e3 / (flop.linears + flop.attention))
    assert prefill_s(TINY, 3, 1e3, 1e2) == pytest.approx(flop.linears / 1e3 + flop.attention / 1e2)
