from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import ContextLengthError, InvalidRequestError, OverloadedError
from services.router.engine import GenerationRequest
from services.router.scheduling.admission import (
    PLACE_SHIFT,
    Admission,
    CompletionRate,
    num_ahead,
    num_blocks_for,
    retry_after_s,
)
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from services.router.scheduling.step_plan import StepPlan
from tests.support.router.scheduling import add, complete, is_idle, make_scheduler, names_in
from tests.support.router.simulated_pipeline import build_request


def admission(max_waiting: int = 2, max_reserved_tokens: int = 100) -> Admission:
    return Admission(SchedulerSettings(4, max_waiting=max_waiting, max_reserved_tokens=max_reserved_tokens))


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


def choice(group: str, index: int, prompt_length: int = 4, max_tokens: int = 50) -> GenerationRequest:
    request = build_request(f"{group}-{index}", prompt_length, max_tokens, seed=ord(group))
    return replace(request, group=group)


def add_choices(scheduler: Scheduler, group: str, count: int, **sizes: int) -> None:
    for index in range(count):
        scheduler.add(choice(group, index, **sizes), now_s=0.0)


def run(scheduler: Scheduler, num_rounds: int) -> list[str]:
    """Names of all who were computed, step by step."""
    seen: list[str] = []
    for _ in range(num_rounds):
        for plan in scheduler.schedule(0.0):
            seen += names_in(plan)
            complete(scheduler, plan)
    return seen


def test_requests_of_one_choice_stand_in_the_order_of_their_arrival() -> None:
    door = admission()
    places = [door.readmit(build_request(name, 1, 1)) for name in "abc"]
    assert places == sorted(set(places))


def test_each_further_choice_lets_one_later_request_pass() -> None:
    door = admission()
    many = [door.readmit(choice("m", index)) for index in range(10)]
    for later in range(1, 5):
        place = door.readmit(build_request(f"later{later}", 1, 1))
        assert sum(place > other for other in many) == later + 1
    assert [place >> PLACE_SHIFT for place in many] == list(range(1, 11))


def test_who_comes_after_a_request_with_choices_for_all_places_runs_with_the_next_step() -> None:
    scheduler = make_scheduler(num_blocks=400, max_batch_sequences=8)
    add_choices(scheduler, "m", 100)
    assert names_in_all(scheduler) == ["m"] * 8
    add(scheduler, "n", prompt_length=4)
    seen = run(scheduler, 2)
    assert "n" in seen, "it got a place, though all were taken"
    assert scheduler.counters.preemptions == 1
    scheduler.check_invariants()


def test_who_comes_after_a_request_with_all_blocks_runs_with_the_next_step() -> None:
    scheduler = make_scheduler(num_blocks=40, max_batch_sequences=64)
    add_choices(scheduler, "m", 20, prompt_length=12, max_tokens=30)
    run(scheduler, 3)
    add(scheduler, "n", prompt_length=16)
    assert "n" in run(scheduler, 2)
    scheduler.check_invariants()


def test_a_request_has_all_places_while_nobody_else_wants_any_and_all_its_choices_end() -> None:
    scheduler = make_scheduler(num_blocks=400, max_batch_sequences=8)
    add_choices(scheduler, "m", 30, max_tokens=3)
    add(scheduler, "n", "o", prompt_length=4, max_tokens=3)
    for _ in range(200):
        for plan in scheduler.schedule(0.0):
            complete(scheduler, plan)
    assert is_idle(scheduler)
    assert scheduler.counters.requests_finished == 32


def test_a_single_request_is_never_put_back_for_a_later_one() -> None:
    scheduler = make_scheduler(num_blocks=400, max_batch_sequences=2)
    add(scheduler, "a", "b", "c", prompt_length=4)
    run(scheduler, 3)
    add_choices(scheduler, "m", 5)
    run(scheduler, 3)
    assert scheduler.counters.preemptions == 0


def test_a_request_counts_towards_the_queue_of_others_with_its_share_only() -> None:
    waiting = [choice("m", index) for index in range(100)]
    assert num_ahead(waiting, choice("m", 100), max_waiting=80) == 100
    assert num_ahead(waiting, choice("n", 0), max_waiting=80) == 10
    scheduler = make_scheduler(max_waiting=16)
    add_choices(scheduler, "m", 16)
    with pytest.raises(OverloadedError):
        scheduler.add(choice("m", 16), now_s=0.0)
    add(scheduler, "n")


def test_the_choices_of_one_request_cannot_reserve_all_tokens() -> None:
    scheduler = make_scheduler(num_blocks=4000, max_reserved_tokens=400)
    add_choices(scheduler, "m", 3, prompt_length=50, max_tokens=50)
    with pytest.raises(InvalidRequestError, match="300 tokens in all"):
        scheduler.add(choice("m", 3, 50, 50), now_s=0.0)
    add(scheduler, "n", prompt_length=50, max_tokens=50)
    scheduler.check_invariants()


def names_in_all(scheduler: Scheduler) -> list[str]:
    plans: list[StepPlan] = scheduler.schedule(0.0)
    names = [name for plan in plans for name in names_in(plan)]
    for plan in plans:
        complete(scheduler, plan)
    return names
