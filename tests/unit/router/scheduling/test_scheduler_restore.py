"""Requests of a router before this one: they go on after their tokens, and nothing refuses them."""

from __future__ import annotations

import pytest

from common.errors import InvalidRequestError, OverloadedError
from common.ids import Generation
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from tests.support.simulated_pipeline import build_request
from tests.unit.router.scheduling.test_scheduler import P0, add, complete, make_scheduler, names_in, only_plan


def test_restored_request_goes_on_after_its_tokens() -> None:
    scheduler = make_scheduler()
    request = build_request("a", 4, 5, seed=ord("a"))
    scheduler.restore(request, [7, 8, 9], now_s=0.0)
    scheduler.check_invariants()
    plan = only_plan(scheduler)
    (chunk,) = plan.chunks
    assert chunk.token_ids == (*request.prompt_token_ids, 7, 8, 9)
    assert (chunk.sampling_position, chunk.num_generated) == (7, 3)
    (fourth,) = complete(scheduler, plan)
    assert fourth.token.finish_reason is None
    (last,) = complete(scheduler, only_plan(scheduler))
    assert last.token.finish_reason == "length"
    assert scheduler.is_idle


def test_restored_requests_are_refused_by_nothing_and_come_before_new_ones() -> None:
    scheduler = make_scheduler(num_blocks=4, max_waiting=1, max_reserved_tokens=16)
    for name in "abc":
        scheduler.restore(build_request(name, 4, 10, seed=ord(name)), [1], now_s=0.0)
    scheduler.check_invariants()
    with pytest.raises(OverloadedError):
        add(scheduler, "d")
    assert names_in(only_plan(scheduler)) == ["a", "b"]


@pytest.mark.parametrize("outage", ["before the first run", "after it"])
def test_restored_request_waits_for_a_mesh_that_starts_longer_than_an_outage_may_last(outage: str) -> None:
    scheduler = Scheduler(SchedulerSettings(block_tokens=4, max_outage_s=10.0, max_queue_s=100.0))
    scheduler.restore(build_request("a", 4, 10, seed=1), [1], now_s=0.0)
    if outage == "after it":
        scheduler.open_pipeline(P0, Generation(1), 100, 1, now_s=0.0)
        only_plan(scheduler)
        scheduler.close_pipeline(P0, now_s=0.0)
    scheduler.schedule(now_s=50.0)
    assert bool(scheduler.take_failures()) == (outage == "after it")
    scheduler.schedule(now_s=101.0)
    assert scheduler.is_idle, "every wait has an end"


def test_a_request_that_was_finished_cannot_be_restored() -> None:
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequestError, match="was finished"):
        scheduler.restore(build_request("a", 4, 2), [1, 2], now_s=0.0)
    add(scheduler, "b")
    with pytest.raises(InvalidRequestError, match="is here already"):
        scheduler.restore(build_request("b", 4, 2), [1], now_s=0.0)
    scheduler.check_invariants()
