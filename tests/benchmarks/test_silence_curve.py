"""The curve of a trace that is made up."""

from __future__ import annotations

from dataclasses import replace

from common.node.silence import EARLY
from tests.benchmarks.silence_curve import Silence, adaptive_rule, as_table, constant_rule, curve, read_trace


def steady(seconds: float, count: int, *, link: str = "stage-1", from_s: float = 0.0) -> list[Silence]:
    return [Silence(from_s + 0.05 * number, link, seconds) for number in range(count)]


def test_a_trace_is_read_line_by_line() -> None:
    assert read_trace(["1.0000 stage-1 0.0500\n"]) == [Silence(1.0, "stage-1", 0.05)]


def test_a_constant_takes_each_longer_silence_for_a_death() -> None:
    trace = [*steady(0.05, 1000), Silence(50.0, "stage-1", 0.4)]
    assert constant_rule(trace, 0.3).false_deaths == 1
    assert constant_rule(trace, 0.5).false_deaths == 0


def test_a_link_that_has_shown_a_long_silence_is_given_longer_and_a_link_beside_it_is_not() -> None:
    patience = replace(EARLY, factor=2.0, shortest_s=0.2)
    trace = [*steady(0.05, 100), Silence(5.0, "stage-1", 0.15), *steady(0.05, 100, from_s=5.05)]
    again = [*trace, Silence(10.1, "stage-1", 0.29)]
    assert adaptive_rule(again, patience).false_deaths == 0
    other = sorted([*again, *steady(0.05, 200, link="stage-2")], key=lambda silence: silence.at_s)
    assert adaptive_rule([*other, Silence(10.2, "stage-2", 0.29)], patience).false_deaths == 1


def test_longer_thresholds_never_bring_more_false_deaths() -> None:
    trace = [Silence(0.05 * number, "stage-1", (number * 37 % 101) / 100) for number in range(2000)]
    constants = [outcome for outcome in curve(trace) if outcome.rule.startswith("constant")]
    deaths = [outcome.false_deaths for outcome in constants]
    assert deaths == sorted(deaths, reverse=True)
    assert as_table(constants).count("\n") == len(constants) + 1
