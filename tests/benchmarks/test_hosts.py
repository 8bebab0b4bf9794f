"""How two hosts are told beside one."""

from __future__ import annotations

import pytest

from tests.benchmarks.hosts import ONE, TWO, HostsFigures, HostsReport, markdown, ratio_of
from tests.benchmarks.machine import Machine

MACHINE = Machine("cpu", 2, 23.5, "AVX512", "", "6", "3.11", "2", "5", "abc", 0.1)


def report(ones: list[tuple[float, float]], twos: list[tuple[float, float]]) -> HostsReport:
    """Of rounds with (x1, x16) tokens a second."""
    rounds = {
        name: [HostsFigures({1: first, 16: last}, ttft_ms=first / 10) for first, last in speeds]
        for name, speeds in ((ONE, ones), (TWO, twos))
    }
    return HostsReport(MACHINE, "bench", {}, 100, 96, rounds)


def test_ratios_are_taken_within_a_round() -> None:
    ratio = ratio_of([80.0, 150.0, 30.0], [100.0, 200.0, 25.0])
    assert (ratio.middle, ratio.low, ratio.high) == pytest.approx((0.8, 0.75, 1.2))


def test_each_goal_is_said_to_be_met_or_not() -> None:
    met, missed = report([(100, 600)], [(75, 530)]).sentences()
    assert met == "Two hosts at x1: 0.75 of one; the goal of 0.75 is met."
    assert missed == "Two hosts at x16: 0.88 of one; the goal of 0.9 is not met."


def test_the_table_has_medians_and_the_ratio_with_its_range() -> None:
    page = markdown(report([(100, 600), (110, 620), (90, 610)], [(80, 610), (77, 620), (81, 549)]))
    assert "| x1, tokens/s | 100.0 | 80.0 | 0.80 | 0.70 | 0.90 |" in page
    assert "| TTFT of 100 tokens, ms | 10.0 | 8.0 | 0.80 | 0.70 | 0.90 |" in page
