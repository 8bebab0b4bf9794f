"""Whom a stage keeps away from: by a clock that is moved by hand."""

from __future__ import annotations

import itertools

from services.stage.experts.hedging import (
    DOUBT_LAPSES_S,
    FORGIVEN_AFTER_ANSWERS,
    FREE_STRIKES,
    LONGEST_PENALTY_S,
    STRUCK_S,
    SUSPECT_AFTER_LOSSES,
    OutlierDetector,
)

NODE, OTHER = 3, 4


def test_a_node_that_answers_in_time_is_never_in_doubt() -> None:
    suspicions = OutlierDetector()
    for number in range(50):
        suspicions.heard(NODE, float(number))
        suspicions.answered_in_time(NODE)
    assert suspicions.doubted(50.0) == set()
    assert not suspicions.is_struck(NODE)


def test_one_that_lost_a_hedge_is_in_doubt_until_it_says_anything() -> None:
    suspicions = OutlierDetector()
    assert not suspicions.lost(NODE, 1.0), "one loss is no suspicion"
    assert suspicions.doubted(1.5) == {NODE}
    suspicions.heard(NODE, 1.6)
    assert suspicions.doubted(1.6) == set()
    assert suspicions.is_struck(NODE), "its next late call is hedged without budget"


def test_one_that_loses_several_in_a_row_becomes_suspect_once() -> None:
    suspicions = OutlierDetector()
    outcomes = [suspicions.lost(NODE, 1.0) for _ in range(SUSPECT_AFTER_LOSSES + 2)]
    assert outcomes == [False] * (SUSPECT_AFTER_LOSSES - 1) + [True, False, False]


def test_losses_with_a_sign_of_life_between_them_are_not_in_a_row() -> None:
    suspicions = OutlierDetector()
    for number in range(5 * SUSPECT_AFTER_LOSSES):
        assert not suspicions.lost(NODE, float(number))
        suspicions.heard(NODE, number + 0.5)


def test_one_that_is_silent_while_others_answer_is_suspect_until_it_speaks() -> None:
    suspicions = OutlierDetector()
    assert suspicions.silent(NODE, 2.0)
    assert not suspicions.silent(NODE, 2.1), "once"
    assert suspicions.is_doubted(NODE, 2.1)
    suspicions.heard(NODE, 3.0)
    assert not suspicions.is_doubted(NODE, 3.0)
    assert suspicions.silent(NODE, 4.0), "and anew"


def test_others_are_not_concerned() -> None:
    suspicions = OutlierDetector()
    suspicions.silent(NODE, 2.0)
    assert not suspicions.is_doubted(OTHER, 2.0)
    assert not suspicions.is_struck(OTHER)


def test_a_node_that_is_late_time_after_time_is_kept_away_from_for_longer_and_longer() -> None:
    suspicions, now_s, waits = OutlierDetector(), 0.0, []
    for _ in range(FREE_STRIKES + 8):
        suspicions.lost(NODE, now_s)
        since_s = now_s
        while suspicions.is_doubted(NODE, now_s):
            now_s += 0.05
            suspicions.heard(NODE, now_s)
        waits.append(now_s - since_s)
    assert all(later >= earlier - 0.06 for earlier, later in itertools.pairwise(waits))
    assert max(waits[:FREE_STRIKES]) <= 0.051, "a pause alone costs nothing"
    assert LONGEST_PENALTY_S - 0.01 <= waits[-1] <= LONGEST_PENALTY_S + 0.06


def test_it_is_forgiven_after_it_has_answered_in_time_for_a_while() -> None:
    suspicions = OutlierDetector()
    for _ in range(FREE_STRIKES):
        suspicions.lost(NODE, 0.0)
        suspicions.heard(NODE, 0.0)
    for _ in range(FORGIVEN_AFTER_ANSWERS):
        assert suspicions.is_struck(NODE)
        suspicions.heard(NODE, 1.0)
        suspicions.answered_in_time(NODE)
    assert not suspicions.is_struck(NODE)


def test_a_doubt_that_nothing_ends_lapses() -> None:
    suspicions = OutlierDetector()
    suspicions.silent(NODE, 1.0)
    assert suspicions.is_doubted(NODE, 1.0 + 0.99 * DOUBT_LAPSES_S)
    assert not suspicions.is_doubted(NODE, 1.0 + DOUBT_LAPSES_S)


def test_a_new_connection_starts_clean() -> None:
    suspicions = OutlierDetector()
    suspicions.silent(NODE, 1.0)
    suspicions.forget(NODE)
    assert not suspicions.is_doubted(NODE, 1.0)
    assert not suspicions.is_struck(NODE)


def test_a_node_that_is_not_asked_any_more_counts_as_struck_for_a_while_only() -> None:
    suspicions = OutlierDetector()
    suspicions.lost(NODE, 1.0)
    suspicions.heard(NODE, 1.1)
    assert suspicions.is_anyone_struck(1.0 + STRUCK_S - 0.1)
    assert not suspicions.is_anyone_struck(1.0 + STRUCK_S)


def test_a_node_in_doubt_counts_as_struck_for_as_long_as_it_is() -> None:
    suspicions = OutlierDetector()
    suspicions.lost(NODE, 1.0)
    assert suspicions.is_anyone_struck(1000.0)
