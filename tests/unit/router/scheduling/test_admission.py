from __future__ import annotations

import pytest

from common.errors import ContextLengthError, InvalidRequestError, OverloadedError
from services.router.scheduling.admission import Admission, CompletionRate, num_blocks_for, retry_after_s
from tests.support.router.simulated_pipeline import build_request


def admission(max_waiting: int = 2, max_reserved_tokens: int = 100) -> Admission:
    return Admission(max_waiting=max_waiting, max_reserved_tokens=max_reserved_tokens, block_tokens=4)


def admit(
    door: Admission, prompt_length: int, max_tokens: int, *, num_waiting: int = 0, largest_pool: int | None = None
) -> None:
    door.admit(
        build_request("a", prompt_length, max_tokens),
        num_waiting=num_waiting,
        largest_pool_blocks=largest_pool,
        completions_per_s=1.0,
    )


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_last_block_may_be_part_full(num_tokens: int, num_blocks: int) -> None:
    assert num_blocks_for(num_tokens, 4) == num_blocks


def test_request_that_fills_the_largest_pool_is_let_in() -> None:
    admit(admission(), 10, 10, largest_pool=5)


def test_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ContextLengthError, match=r"10 prompt tokens \+ 11 max_tokens = 21 .* 6 cache .* has 5 \(20 tok"
    ):
        admit(admission(), 10, 11, largest_pool=5)


def test_any_size_may_wait_while_no_pipeline_is_open() -> None:
    admit(admission(), 50, 50, largest_pool=None)


def test_full_queue_is_refused_with_a_time_to_come_back() -> None:
    with pytest.raises(OverloadedError) as refused:
        admit(admission(max_waiting=7), 1, 1, num_waiting=7)
    assert refused.value.retry_after_s == 7


def test_tokens_are_reserved_until_released() -> None:
    door = admission(max_reserved_tokens=100)
    admit(door, 30, 30)
    with pytest.raises(OverloadedError, match="60 tokens are reserved of 100"):
        admit(door, 40, 10)
    door.release(build_request("a", 30, 30))
    admit(door, 40, 10)
    assert door.reserved_tokens == 50


def test_refused_request_reserves_nothing() -> None:
    door = admission()
    with pytest.raises(OverloadedError):
        admit(door, 1, 1, num_waiting=2)
    assert door.reserved_tokens == 0


@pytest.mark.parametrize(("prompt_length", "max_tokens"), [(0, 1), (1, 0)])
def test_nothing_to_do_is_invalid(prompt_length: int, max_tokens: int) -> None:
    with pytest.raises(InvalidRequestError, match="at least 1"):
        admit(admission(), prompt_length, max_tokens)


@pytest.mark.parametrize(
    ("num_waiting", "completions_per_s", "seconds"),
    [(0, 0.0, 1), (5, 0.0, 60), (5, 2.0, 3), (5, 100.0, 1), (1000, 1.0, 60)],
)
def test_retry_after_is_when_the_line_ahead_is_served(num_waiting: int, completions_per_s: float, seconds: int) -> None:
    assert retry_after_s(num_waiting, completions_per_s) == seconds


def test_completion_rate_falls_in_a_standstill() -> None:
    rate = CompletionRate()
    assert rate.per_s(0.0) == 0.0
    for second in range(11):
        rate.note(float(second))
    assert rate.per_s(10.0) == pytest.approx(1.0)
    assert rate.per_s(100.0) == pytest.approx(0.1)
