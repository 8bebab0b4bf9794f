"""Steps whose tokens are not known yet: what waits for what, and which tokens they get."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.errors import ProtocolError
from common.messages import AWAITED_TOKEN, Header, Step, StepResult
from common.wire.array import array_to_frame, frame_to_array
from services.stage.slot.early_steps import KEPT_STEPS, EarlySteps
from services.stage.step_output import EMPTY_RESULT
from tests.unit.stage.model.test_micro_batch import step


def result(samples: dict[int, int]) -> StepResult:
    return replace(
        EMPTY_RESULT,
        sequence_ids=array_to_frame(np.array(list(samples), dtype=np.int64)),
        token_ids=array_to_frame(np.array(list(samples.values()), dtype=np.int32)),
    )


def decode(tokens: dict[int, int], awaited_step: int = 0) -> Step:
    """One token of each sequence."""
    rows: list[tuple[int, ...]] = [(sequence_id, 5, 1, 1, 0, 1) for sequence_id in tokens]
    hidden = array_to_frame(np.array(list(tokens.values()), dtype=np.int32))
    return replace(step(rows, []), hidden=hidden, awaited_step=awaited_step)


def tokens_of(message: Step) -> list[int]:
    tokens: list[int] = frame_to_array(message.hidden, "int32", (None,), "hidden").tolist()
    return tokens


def popped(steps: EarlySteps) -> list[int]:
    """Numbers of those that need not wait."""
    numbers = []
    while (arrived := steps.pop()) is not None:
        numbers.append(arrived.header.step)
    return numbers


def test_a_step_waits_for_its_tokens_and_what_is_behind_it_waits_too() -> None:
    steps = EarlySteps()
    steps.add(decode({1: 4}), Header(step=10), 0.0)
    steps.add(decode({1: AWAITED_TOKEN}, 10), Header(step=11), 0.0)
    steps.add(decode({2: 4}), Header(step=12), 0.0)
    assert popped(steps) == [10]
    for other in (9, 13):
        steps.note_samples(other, result({1: 3}))
        assert popped(steps) == [], "these are other tokens"
    steps.note_samples(10, result({1: 8}))
    assert popped(steps) == [11, 12]


def test_tokens_may_be_there_before_the_step() -> None:
    steps = EarlySteps()
    steps.note_samples(10, result({1: 8}))
    steps.add(decode({1: AWAITED_TOKEN}, 10), Header(step=11), 0.0)
    assert popped(steps) == [11]


def test_each_sequence_gets_its_own_token_and_what_is_told_stays() -> None:
    steps = EarlySteps()
    steps.note_samples(10, result({1: 8, 2: 9, 3: 6}))
    assert tokens_of(steps.with_tokens(decode({3: AWAITED_TOKEN, 7: 4, 1: AWAITED_TOKEN}, 10))) == [6, 4, 8]
    told = decode({3: 2})
    assert steps.with_tokens(told) is told


def test_a_step_that_has_its_tokens_waits_nowhere_else() -> None:
    first, second = EarlySteps(), EarlySteps()
    first.note_samples(10, result({1: 8}))
    second.add(first.with_tokens(decode({1: AWAITED_TOKEN}, 10)), Header(step=11), 0.0)
    assert popped(second) == [11]


def test_a_sequence_without_a_sample_is_refused() -> None:
    steps = EarlySteps()
    steps.note_samples(10, result({1: 8}))
    with pytest.raises(ProtocolError, match="no token of sequence 2"):
        steps.with_tokens(decode({1: AWAITED_TOKEN, 2: AWAITED_TOKEN}, 10))


def test_samples_of_the_last_few_steps_are_kept_in_whatever_order_they_come() -> None:
    steps = EarlySteps()
    for number in (12, 10, 14):
        steps.note_samples(number, result({1: number}))
    assert tokens_of(steps.with_tokens(decode({1: AWAITED_TOKEN}, 10))) == [10]
    for number in range(20, 20 + KEPT_STEPS):
        steps.note_samples(number, result({1: 3}))
    steps.add(decode({1: AWAITED_TOKEN}, 14), Header(step=15), 0.0)
    assert popped(steps) == [], "its tokens were let go: it is lost, and done again"


def test_a_result_whose_arrays_do_not_fit_is_refused() -> None:
    with pytest.raises(ProtocolError):
        EarlySteps().note_samples(10, replace(result({1: 8}), token_ids=EMPTY_RESULT.token_ids))
