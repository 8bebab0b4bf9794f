"""How two pipelines are told beside one."""

from __future__ import annotations

import pytest

from tests.benchmarks.pipeline_pair import PairFigures, PipelineFigures, describe

ALONE = PipelineFigures(1, 1, 60.0, 120.0, ttft_p95_ms=100.0)
ONE = PipelineFigures(1, 2, 60.0, 120.0, ttft_p95_ms=900.0)


def test_two_are_held_against_the_speedup_of_the_bandwidths_and_against_the_waits_of_one_with_one_client() -> None:
    pair = PairFigures(ALONE, ONE, PipelineFigures(2, 2, 102.0, 216.0, ttft_p95_ms=112.0))
    assert (pair.speedup, pair.allowed_speedup, pair.ttft_ratio) == pytest.approx((1.7, 1.8, 1.12))
    *_, speed, waits = describe(pair)
    assert speed.endswith("That is 0.94 of it; the goal of 0.85 is met.")
    assert waits == "Their TTFT p95 is 1.12 times that of one alone; the goal of 1.1 is not met."


def test_each_load_is_told_by_itself() -> None:
    first, second, third, *_ = describe(PairFigures(ALONE, ONE, ALONE))
    assert first == "1 pipeline with 1 client: 60.0 tokens/s, 50% of what the bandwidth allows; TTFT p95 100 ms."
    assert second.startswith("1 pipeline with 2 clients: 60.0 tokens/s")
    assert third == first
