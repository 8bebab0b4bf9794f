"""How often guesses are right: what is learned, by whom, and how fast."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ids import RequestId
from services.router.scheduling.drafts.acceptance import FIRST_RATE, Acceptance

A, B = RequestId("a"), RequestId("b")


def seen(rate: float, times: int, request: RequestId = A, grade: int = 0, length: int = 15) -> Acceptance:
    """Guesses each of whose tokens was right at this rate, if those before it were."""
    source, acceptance = random.Random(4), Acceptance()
    for _ in range(times):
        num_right = next((place for place in range(length) if source.random() >= rate), length)
        acceptance.note(request, grade, num_right, has_wrong=num_right < length)
    return acceptance


def test_before_anything_was_seen_every_token_is_rather_wrong() -> None:
    assert Acceptance().rates(A, 0, 6) == [FIRST_RATE] * 6


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8, 0.95])
def test_a_rate_is_learned_at_every_place(rate: float) -> None:
    acceptance = seen(rate, 1500)
    assert acceptance.rates(B, 0, 3) == pytest.approx([rate] * 3, abs=0.1)
    assert acceptance.rates(A, 0, 2) == pytest.approx([rate] * 2, abs=0.2)


def test_a_new_request_begins_with_what_the_pipeline_has_seen_and_leaves_that_soon() -> None:
    acceptance = seen(0.95, 300)
    assert acceptance.rates(B, 0, 1)[0] > 0.85
    for _ in range(12):
        acceptance.note(B, 0, 0, has_wrong=True)
    assert acceptance.rates(B, 0, 1)[0] < 0.3
    assert acceptance.rates(A, 0, 1)[0] > 0.85


def test_a_change_of_the_text_is_noticed_within_some_ten_tokens() -> None:
    acceptance = seen(0.95, 300)
    for _ in range(20):
        acceptance.note(A, 0, 0, has_wrong=True)
    assert acceptance.rates(A, 0, 1)[0] < 0.5
    for _ in range(20):
        acceptance.note(A, 0, 2, has_wrong=False)
    assert acceptance.rates(A, 0, 1)[0] > 0.5


def test_grades_are_learned_apart() -> None:
    acceptance = seen(0.95, 100, grade=2)
    for _ in range(100):
        acceptance.note(A, 0, 0, has_wrong=True)
    assert acceptance.rates(A, 2, 1)[0] > 0.8
    assert acceptance.rates(A, 0, 1)[0] < 0.1
    assert acceptance.rates(A, 1, 1)[0] == FIRST_RATE


def test_a_place_that_was_not_come_to_is_judged_by_those_before_it() -> None:
    acceptance = Acceptance()
    for _ in range(50):
        acceptance.note(A, 0, 1, has_wrong=False)
    assert acceptance.rates(A, 0, 8)[-1] > 0.7
    for _ in range(50):
        acceptance.note(A, 0, 3, has_wrong=True)
    assert acceptance.rates(A, 0, 4)[0] > 0.9
    assert acceptance.rates(A, 0, 4)[3] < 0.7


def test_a_request_that_has_ended_is_forgotten_and_the_pipeline_goes_on_knowing() -> None:
    acceptance = seen(0.95, 300)
    acceptance.forget(A)
    acceptance.forget(B)
    assert acceptance.rates(A, 0, 4) == acceptance.rates(B, 0, 4)
    assert acceptance.rates(A, 0, 1)[0] > 0.85


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, 2), st.integers(0, 15), st.booleans()), max_size=60))
def test_rates_are_probabilities_whatever_was_seen(notes: list[tuple[RequestId, int, int, bool]]) -> None:
    acceptance = Acceptance()
    for request, grade, num_right, has_wrong in notes:
        acceptance.note(request, grade, num_right, has_wrong=has_wrong)
    for grade in range(3):
        assert all(0 < rate < 1 for rate in acceptance.rates(A, grade, 15))
