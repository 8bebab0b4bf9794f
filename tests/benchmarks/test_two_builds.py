"""The comparison of two builds, from figures that are made up."""

from __future__ import annotations

import random

import pytest

from tests.benchmarks.two_builds import BuildFigures, Comparison, Pair, bootstrap_interval, compare, table


def pair(before: float, after: float) -> Pair:
    return Pair(BuildFigures(before, before, before, before), BuildFigures(after, after, after, after))


def test_the_interval_is_the_same_for_the_same_source() -> None:
    values = [random.Random(1).gauss(1, 0.1) for _ in range(20)]
    assert bootstrap_interval(values, random.Random(2)) == bootstrap_interval(values, random.Random(2))


def test_the_interval_holds_the_median_and_lies_within_the_values() -> None:
    source = random.Random(3)
    values = [source.gauss(1, 0.1) for _ in range(20)]
    low, high = bootstrap_interval(values, source)
    assert min(values) <= low < sorted(values)[9] <= sorted(values)[10] < high <= max(values)
    assert bootstrap_interval([2.0] * 5, source) == (2.0, 2.0)


def test_the_interval_has_the_true_median_about_as_often_as_it_says() -> None:
    source, inside = random.Random(4), 0
    for _ in range(200):
        low, high = bootstrap_interval([source.gauss(1, 0.1) for _ in range(20)], source, resamples=400)
        inside += low <= 1 <= high
    assert 0.88 <= inside / 200 <= 1


def test_ratios_are_taken_within_a_pair() -> None:
    # The machine became slower halfway: medians alone would show nothing.
    pairs = [pair(1.0, 1.1)] * 10 + [pair(2.0, 2.2)] * 10
    found = {row.figure: row for row in compare(pairs, random.Random(5))}
    cost, speed = found["cpu_ms_a_token"], found["steady_tokens_per_s"]
    assert (cost.ratio, cost.low, cost.high) == pytest.approx((1.1, 1.1, 1.1))
    # More CPU a token is worse, more tokens a second are better.
    assert (cost.verdict, speed.verdict) == ("worse", "better")


def test_an_interval_around_one_shows_no_difference() -> None:
    row = Comparison("ttft_ms", 100.0, 99.0, 0.99, 0.97, 1.01, less_is_better=True)
    assert row.verdict == "no difference"
    assert table([row]).splitlines()[-1] == "| TTFT, ms | 100 | 99 | 0.990 | 0.970 to 1.010 | no difference |"
