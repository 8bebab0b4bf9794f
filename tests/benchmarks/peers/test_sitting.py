"""A sitting asks for what the load says, and its figures are medians over rounds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.benchmarks.peers.sitting import Load, columns_of, percentile_95, sit
from tests.benchmarks.serve_benchmark import PromptSource
from tests.benchmarks.streaming_client import StreamTimes

LOAD = Load(
    concurrencies=(1, 4),
    prompt_tokens=10,
    answer_tokens=5,
    prefill_tokens=(50,),
    prefill_tries=2,
    crowd=3,
    crowd_prompt_tokens=20,
    crowd_answer_tokens=2,
)


class Clockwork:
    """Answers each prompt token in a millisecond, and each token after the first in `gap_s`."""

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self.prompts: list[tuple[int, ...]] = []

    def run_round(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Sequence[StreamTimes]:
        self.prompts += [tuple(prompt) for prompt in prompts]
        first_s = sum(len(prompt) for prompt in prompts) / 1000
        arrivals = tuple((first_s + self._gap_s * number, 1) for number in range(max_tokens))
        return tuple(StreamTimes(0.0, arrivals) for _ in prompts)


def test_figures_are_those_of_the_engine_and_no_prompt_comes_twice() -> None:
    engine, source = Clockwork(gap_s=0.01), PromptSource(1000)
    columns = columns_of([sit(engine, source, LOAD)], LOAD)
    assert columns == pytest.approx(
        {
            "steady x1": 100,
            "steady x4": 400,
            "overall x1": 5 / 0.05,
            "overall x4": 20 / 0.08,
            "prefill 50": 1000,
            "TTFT p50": 60,
            "TTFT p95": 60,
        }
    )
    assert len(set(engine.prompts)) == len(engine.prompts)


def test_the_median_of_the_rounds_is_what_counts() -> None:
    sittings = [sit(Clockwork(gap_s), PromptSource(1000), LOAD) for gap_s in (0.01, 0.02, 0.5)]
    assert columns_of(sittings, LOAD)["steady x1"] == pytest.approx(50)


def test_the_95th_percentile_lies_between_neighbours() -> None:
    assert percentile_95([float(value) for value in range(101)]) == 95
    assert percentile_95([7.0]) == 7
