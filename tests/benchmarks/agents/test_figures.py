"""Figures of conversations that are made up."""

from __future__ import annotations

import math

import pytest

from tests.benchmarks.agents.conversations import Traffic
from tests.benchmarks.agents.figures import cached_share, columns_of, name_of, turn_groups
from tests.benchmarks.agents.playing import PlayedTurn
from tests.benchmarks.streaming_client import Answer, StreamTimes


def played_turn(sent_s: float, ttft_s: float, prompt: int = 100, cached: int | None = None) -> PlayedTurn:
    """Three tokens, the later two in 0.1 s each."""
    arrivals = tuple((sent_s + ttft_s + gap_s, 1) for gap_s in (0, 0.1, 0.2))
    return PlayedTurn(prompt, Answer(StreamTimes(sent_s, arrivals), (5, 6, 7), cached))


def traffic(turns: int) -> Traffic:
    return Traffic(2, turns, 10, (1, 1), (3, 3), (0, 0))


def test_the_first_turn_stands_by_itself_and_every_other_one_in_one_group() -> None:
    assert list(map(name_of, turn_groups(20))) == [
        "turn 1",
        "turns 2 to 5",
        "turns 6 to 10",
        "turns 11 to 15",
        "turns 16 to 20",
    ]
    assert turn_groups(1) == [range(1, 2)]
    for turns in range(1, 60):
        groups = turn_groups(turns)
        assert [number for group in groups for number in group] == list(range(1, turns + 1))
        assert len(groups) <= 5


def test_times_are_quantiles_by_group_and_rates_are_over_the_whole_time() -> None:
    played = [
        [played_turn(0, 1.0), played_turn(2, 0.2)],
        [played_turn(0, 3.0), played_turn(9.4, 0.4)],
    ]
    figures = columns_of([played], traffic(2))
    assert figures["seconds"] == pytest.approx(10)
    assert figures["tokens/s"] == pytest.approx(1.2)
    assert figures["TPOT p50"] == pytest.approx(100)
    assert figures["TTFT p50 turn 1"] == pytest.approx(2000)
    assert figures["TTFT p95 turn 1"] == pytest.approx(2900)
    assert figures["TTFT p50 turn 2"] == pytest.approx(300)
    assert figures["TTFT p50"] == pytest.approx(700)


def test_a_round_that_was_stopped_has_no_seconds_and_no_figures_of_turns_that_it_has_not_come_to() -> None:
    figures = columns_of([[[played_turn(0, 1.0)], [played_turn(0, 1.0)]]], traffic(2))
    assert math.isnan(figures["seconds"])
    assert figures["tokens/s"] == pytest.approx(6 / 1.2)
    assert "TTFT p50 turn 2" not in figures


def test_the_cached_share_is_of_all_prompt_tokens_and_unknown_where_the_engine_does_not_say() -> None:
    played = [[played_turn(0, 1, prompt=100, cached=0), played_turn(2, 1, prompt=300, cached=200)], []]
    assert cached_share([played], range(1, 3)) == pytest.approx(0.5)
    assert cached_share([played], range(1, 2)) == 0
    assert math.isnan(cached_share([played], range(3, 4)))
    assert math.isnan(cached_share([[[played_turn(0, 1)]]], range(1, 2)))
