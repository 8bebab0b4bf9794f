"""The curve of a trace that is made up."""

from __future__ import annotations

from dataclasses import replace

from common.node.silence import EARLY
from tests.benchmarks.silence_curve import Silence, adaptive_rule, as_table, constant_rule, curve, read_trace


def silence(at_s: float, link: str, seconds: float) -> Silence:
    """One in which nothing was answered."""
    return Silence(at_s, link, seconds, seconds)


def steady(seconds: float, count: int, *, link: str = "stage-1", from_s: float = 0.0) -> list[Silence]:
    return [silence(from_s + 0.05 * number, link, seconds) for number in range(count)]


def test_a_trace_is_read_line_by_line() -> None:
    assert read_trace(["1.0000 stage-1 0.0500 0.0400\n"]) == [Silence(1.0, "stage-1", 0.05, 0.04)]


def test_a_constant_takes_each_longer_silence_for_a_death() -> None:
    trace = [*steady(0.05, 1000), silence(50.0, "stage-1", 0.4)]
    assert constant_rule(trace, 0.3).false_deaths == 1
    assert constant_rule(trace, 0.5).false_deaths == 0


def test_a_link_that_has_shown_a_long_silence_is_given_longer_and_a_link_beside_it_is_not() -> None:
    patience = replace(EARLY, factor=2.0, shortest_s=0.2)
    trace = [*steady(0.05, 100), silence(5.0, "stage-1", 0.15), *steady(0.05, 100, from_s=5.05)]
    again = [*trace, silence(10.1, "stage-1", 0.29)]
    assert adaptive_rule(again, patience).false_deaths == 0
    other = sorted([*again, *steady(0.05, 200, link="stage-2")], key=lambda one: one.at_s)
    assert adaptive_rule([*other, silence(10.2, "stage-2", 0.29)], patience).false_deaths == 1


def test_longer_thresholds_never_bring_more_false_deaths() -> None:
    trace = [silence(0.05 * number, "stage-1", (number * 37 % 101) / 100) for number in range(2000)]
    constants = [outcome for outcome in curve(trace) if outcome.rule.startswith("constant")]
    deaths = [outcome.false_deaths for outcome in constants]
    assert deaths == sorted(deaths, reverse=True)
    assert as_table(constants).count("\n") == len(constants) + 1


def test_a_silence_in_which_work_was_answered_is_judged_by_what_is_left_of_it() -> None:
    trace = [*steady(0.05, 100), Silence(5.0, "stage-1", 0.4, 0.1)]
    assert constant_rule(trace, 0.3).false_deaths == 0
    assert adaptive_rule(trace, replace(EARLY, factor=2.0, shortest_s=0.2)).false_deaths == 0
