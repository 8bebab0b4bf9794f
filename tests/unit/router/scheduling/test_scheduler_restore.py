"""Requests of a router before this one: they go on after their tokens, and nothing refuses them."""

from __future__ import annotations

import pytest

from common.errors import InvalidRequestError, OverloadedError
from common.ids import Generation, SequenceId
from services.router.control.adoption import HeldCache, HeldSequence
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from tests.support.router.scheduling import (
    P0,
    P1,
    add,
    complete,
    is_idle,
    make_scheduler,
    names_in,
    only_plan,
    open_pipeline,
)
from tests.support.router.simulated_pipeline import build_request, end_of


def test_restored_request_goes_on_after_its_tokens() -> None:
    scheduler = make_scheduler()
    request = build_request("a", 4, 5, seed=ord("a"))
    scheduler.add(request.restored([7, 8, 9]), now_s=0.0)
    scheduler.check_invariants()
    plan = only_plan(scheduler)
    (chunk,) = plan.chunks
    assert chunk.token_ids == (*request.prompt_token_ids, 7, 8, 9)
    assert (end_of(chunk), chunk.num_generated) == (7, 3)
    (fourth,) = complete(scheduler, plan)
    assert fourth.token.finish_reason is None
    (last,) = complete(scheduler, only_plan(scheduler))
    assert last.token.finish_reason == "length"
    assert is_idle(scheduler)


def test_restored_requests_are_refused_by_nothing_and_come_before_new_ones() -> None:
    scheduler = make_scheduler(num_blocks=4, max_waiting=1, max_reserved_tokens=16)
    for name in "abc":
        scheduler.add(build_request(name, 4, 10, seed=ord(name)).restored([1]), now_s=0.0)
    scheduler.check_invariants()
    with pytest.raises(OverloadedError):
        add(scheduler, "d")
    assert names_in(only_plan(scheduler)) == ["a", "b"]


@pytest.mark.parametrize("outage", ["before the first run", "after it"])
def test_restored_request_waits_for_a_mesh_that_starts_longer_than_an_outage_may_last(outage: str) -> None:
    scheduler = Scheduler(SchedulerSettings(block_tokens=4, plans_ahead=False, max_outage_s=10.0, max_queue_s=100.0))
    scheduler.add(build_request("a", 4, 10, seed=1).restored([1]), now_s=0.0)
    if outage == "after it":
        open_pipeline(scheduler, P0, Generation(1), 100, 1, now_s=0.0)
        only_plan(scheduler)
        scheduler.close_pipeline(P0, now_s=0.0)
    scheduler.schedule(now_s=50.0)
    assert bool(scheduler.pop_failures()) == (outage == "after it")
    scheduler.schedule(now_s=101.0)
    assert is_idle(scheduler), "every wait has an end"


TERM = 1 << 32
OLD = 949
"""What a stage of a router before this one says of steps that were not all finished: 950 waits, 951 is through."""


def adopting_scheduler(held_by: dict[int, int], kv_marks: tuple[int, int]) -> Scheduler:
    """A request of which stages hold 9 positions, and a pipeline that has opened with them."""
    scheduler = Scheduler(SchedulerSettings(block_tokens=4, plans_ahead=False), first_number=TERM)
    request = build_request("a", 6, 20, seed=ord("a"))
    scheduler.add(request.restored([1, 2, 3, 4], SequenceId(7)), 0.0)
    held = HeldCache({7: HeldSequence((1, 2, 3), 9)}, (), held_by)
    open_pipeline(scheduler, P0, Generation(1), 32, 2, 0.0, kv_marks, held)
    return scheduler


def replayed(scheduler: Scheduler) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Which slots compute in the next step, and which positions."""
    plan = only_plan(scheduler)
    return plan.computing_slots, [(chunk.start_position, end_of(chunk)) for chunk in plan.chunks]


def test_an_adopted_request_goes_on_where_every_slot_has_reported_and_kept_its_memory() -> None:
    scheduler = adopting_scheduler({0: OLD, 1: OLD}, (OLD + 2, OLD))
    assert replayed(scheduler) == ((), [(9, 10)])


@pytest.mark.parametrize("kv_mark", [OLD, OLD + 2], ids=["a mirror of before", "one that has gone on"])
def test_a_slot_that_did_not_report_gets_all_of_it_again_whatever_its_mark(kv_mark: int) -> None:
    scheduler = adopting_scheduler({0: OLD}, (OLD + 2, kv_mark))
    assert replayed(scheduler) == ((1,), [(0, 9)])


def test_a_slot_whose_memory_is_not_the_one_that_it_reported_gets_all_of_it_again() -> None:
    scheduler = adopting_scheduler({0: OLD, 1: OLD}, (OLD, 0))
    assert replayed(scheduler) == ((1,), [(0, 9)])


def test_a_mirror_of_a_former_time_does_not_stand_for_what_was_adopted_when_it_takes_over_later() -> None:
    scheduler = adopting_scheduler({0: OLD, 1: OLD}, (OLD + 2, OLD + 2))
    plan = only_plan(scheduler)
    complete(scheduler, plan)
    for generation, kv_marks, slots in ((2, (plan.step, plan.step), ()), (3, (OLD + 2, plan.step), (0,))):
        scheduler.suspend_pipeline(P0, 0.0)
        open_pipeline(scheduler, P0, Generation(generation), 32, 2, 0.0, kv_marks)
        assert replayed(scheduler) == (slots, [(0, 10)] if slots else [(10, 11)])


def test_a_request_waits_for_the_pipeline_that_has_its_cache_and_keeps_nobody_else_waiting() -> None:
    scheduler = Scheduler(SchedulerSettings(block_tokens=4, plans_ahead=False), first_number=TERM)
    for name, sequence_id in (("a", SequenceId(7)), ("b", SequenceId(8)), ("c", None)):
        scheduler.add(build_request(name, 6, 20, seed=ord(name)).restored([1, 2, 3, 4], sequence_id), 0.0)
    held = HeldCache({8: HeldSequence((1, 2, 3), 9)}, (), {0: OLD})
    open_pipeline(scheduler, P0, Generation(1), 32, 1, 0.0, (OLD,), held)
    (plan,) = scheduler.schedule(0.0, lambda sequence_id: sequence_id == 7)
    assert names_in(plan) == ["b", "c"]
    complete(scheduler, plan)
    held = HeldCache({7: HeldSequence((1, 2, 3), 9)}, (), {0: OLD})
    open_pipeline(scheduler, P1, Generation(2), 32, 1, 0.0, (OLD,), held)
    plans = {plan.pipeline: plan for plan in scheduler.schedule(0.0)}
    assert names_in(plans[P1]) == ["a"]
    assert plans[P1].chunks[0].start_position == 9


def test_a_request_that_is_not_awaited_any_more_runs_where_there_is_room() -> None:
    scheduler = make_scheduler()
    scheduler.add(build_request("a", 6, 20, seed=ord("a")).restored([1], SequenceId(7)), 0.0)
    assert scheduler.schedule(0.0, lambda sequence_id: True) == []
    scheduler.check_invariants()
    assert names_in(only_plan(scheduler)) == ["a"]


def test_a_request_that_was_finished_cannot_be_restored() -> None:
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequestError, match="was finished"):
        scheduler.add(build_request("a", 4, 2).restored([1, 2]), now_s=0.0)
    add(scheduler, "b")
    with pytest.raises(InvalidRequestError, match="is in use"):
        scheduler.add(build_request("b", 4, 2).restored([1]), now_s=0.0)
    scheduler.check_invariants()
