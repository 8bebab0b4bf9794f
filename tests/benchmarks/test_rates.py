"""Rates of several measurements."""

from __future__ import annotations

from tests.benchmarks.rates import Rates, best_rates


def test_the_best_of_each_figure_counts() -> None:
    quiet, busy = Rates(2, 20.0, 26.0, 200.0, 300.0, 60.0), Rates(2, 21.0, 11.0, 100.0, 400.0, 50.0)
    assert best_rates([quiet, busy]) == Rates(2, 21.0, 26.0, 200.0, 400.0, 60.0)
