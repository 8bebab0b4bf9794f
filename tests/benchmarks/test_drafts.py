"""How drafts are told beside none, and what the router drafts meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.ids import RequestId
from services.router.scheduling.drafts.step_times import Manner, StepTimes
from tests.benchmarks.drafts import CaseFigures, DraftsReport, allowed_speedup, expected_tokens, markdown, medians_ms
from tests.benchmarks.machine import Machine
from tests.benchmarks.make_bench_model import SIZES
from tests.benchmarks.recorded_drafts import RecordedAnswers, Recording, read_steps, record_steps
from tests.unit.router.scheduling.drafts.shapes import BENCH

MACHINE = Machine("cpu", 2, 23.5, "AVX512", "", "6", "3.11", "2", "5", "abc", 0.1)


def case(ratio: float, low: float, high: float, allowed: float | None) -> CaseFigures:
    return CaseFigures(
        "PP=1",
        "right at 0.8",
        0.8,
        [100.0],
        [100.0 * ratio],
        30,
        10,
        ratio,
        low,
        high,
        allowed,
        {"ahead": {1: 6.0}, "drafted": {4: 13.2}},
    )


def test_a_step_is_expected_to_make_the_drafts_that_are_right_and_one_token_more() -> None:
    assert expected_tokens(0.5, 0) == 1
    assert expected_tokens(0.5, 3) == pytest.approx(1.875)
    assert expected_tokens(1.0, 7) == pytest.approx(8)


def test_distinct_bytes_allow_nothing_at_a_half_and_more_than_double_at_19_of_20() -> None:
    allowed = [allowed_speedup(SIZES["bench"], rate, 15) for rate in (0.0, 0.5, 0.8, 0.95, 1.0)]
    assert allowed == pytest.approx([1.0, 1.0, 1.27, 2.5, 3.57], abs=0.03)


def test_each_goal_is_said_to_be_met_or_not() -> None:
    assert case(1.2, 1.1, 1.3, 1.27).sentence == (
        "PP=1, right at 0.8: 1.200 of no drafts (1.100 to 1.300); it is not slower. Distinct bytes allow 1.27; the "
        "goal of 0.9 of that is met."
    )
    assert case(0.97, 0.95, 0.99, None).sentence.endswith("it is slower.")
    assert case(1.1, 0.95, 1.3, 1.27).sentence.endswith("of that is not met.")


def test_the_page_has_pairs_and_what_rows_took_beside_their_bytes() -> None:
    page = markdown(DraftsReport(MACHINE, "bench", 15, 100, 256, 1, [case(1.2, 1.1, 1.3, 1.27)]))
    assert "| PP=1 | right at 0.8 | 100.0 | 120.0 | 1.200 | 1.100 to 1.300 | 1.27 | 30 of 40 |" in page
    assert "| PP=1 | right at 0.8 | 4 | 13.20 | 2.20 | 2.33 |" in page


def test_recorded_answers_are_drafted_right_at_their_rate_and_no_others() -> None:
    answer = list(range(10, 2010))
    source = RecordedAnswers(Recording([[[1, 2], answer]], 0.8, ""))
    guessed = [
        token
        for start in range(0, 2000, 8)
        for token in source.propose(RequestId("a"), (1, 2), answer[:start], 8).token_ids
    ]
    right = sum(token == wanted for token, wanted in zip(guessed, answer, strict=True))
    assert right / 2000 == pytest.approx(0.8, abs=0.03)
    assert source.propose(RequestId("a"), (1, 2), answer[:1998], 8).token_ids[2:] == ()
    assert source.propose(RequestId("a"), (1, 3), [], 8).token_ids == ()
    assert source.propose(RequestId("b"), (1, 2), [], 2000) != source.propose(RequestId("a"), (1, 2), [], 2000)


def test_steps_are_written_as_they_are_measured_and_told_by_medians(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepTimes, "note", StepTimes.note)  # it is put back after this
    times = StepTimes(BENCH)
    with (tmp_path / "steps").open("w") as file:
        record_steps(file)
        for seconds in (0.004, 0.005, 0.006, 0.007, 0.5):
            times.note(Manner.DRAFTED, 4, seconds)
        times.note(Manner.AHEAD, 1, 0.003)
    assert times.knows_drafts
    steps = read_steps(tmp_path / "steps")
    assert steps[Manner.AHEAD, 1] == [0.003]
    assert medians_ms(steps) == {"drafted": {4: pytest.approx(6.0)}}
