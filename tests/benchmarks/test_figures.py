"""Figures count what they say they count."""

from __future__ import annotations

import math

import pytest

from tests.benchmarks.figures import RoundFigures, median_figures, round_figures
from tests.benchmarks.streaming_client import StreamTimes


def test_steady_window_lies_between_the_last_first_token_and_the_first_last_one() -> None:
    early = StreamTimes(0.0, ((1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)))
    late = StreamTimes(0.0, ((2.0, 1), (3.0, 1), (4.0, 1), (5.0, 1)))
    figures = round_figures([early, late])
    # ( 2, 4 ]: two tokens of each stream.
    assert figures.steady_tokens_per_s == pytest.approx(4 / 2)
    assert figures.overall_tokens_per_s == pytest.approx(8 / 5)
    assert figures.ttft_s == pytest.approx(1.5)
    assert figures.last_ttft_s == pytest.approx(2.0)
    assert figures.tpot_s == pytest.approx(1.0)


def test_tokens_that_come_together_count_each() -> None:
    figures = round_figures([StreamTimes(1.0, ((2.0, 2), (4.0, 4)))])
    assert figures.tpot_s == pytest.approx(2 / 4)
    assert figures.steady_tokens_per_s == pytest.approx(4 / 2)


def test_streams_that_never_run_together_have_no_steady_figure() -> None:
    figures = round_figures([StreamTimes(0.0, ((1.0, 1), (2.0, 1))), StreamTimes(0.0, ((3.0, 1), (4.0, 1)))])
    assert math.isnan(figures.steady_tokens_per_s)


def test_median_leaves_out_what_is_no_number() -> None:
    rounds = [RoundFigures(1, 1, 1, 1, steady) for steady in (2.0, math.nan, 4.0)]
    assert median_figures(rounds).steady_tokens_per_s == 3.0
