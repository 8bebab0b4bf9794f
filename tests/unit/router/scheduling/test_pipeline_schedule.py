"""Pipelines that are closed and opened again, over stages that were there all the while."""

from __future__ import annotations

from common.ids import Generation
from tests.support.router.scheduling import P0, P1, add, complete, make_scheduler, only_plan, open_pipeline
from tests.support.router.simulated_pipeline import build_request


def test_what_stages_keep_of_a_closed_pipeline_is_released_with_its_next_first_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", "b", "c", max_tokens=1)
    add(scheduler, "d")
    finished = only_plan(scheduler)
    complete(scheduler, finished)
    under_way = only_plan(scheduler)
    assert set(under_way.released) == {chunk.sequence_id for chunk in finished.chunks[:3]}
    scheduler.close_pipeline(P0, now_s=0.0)
    open_pipeline(scheduler, P0, Generation(2), 100, 1, now_s=0.0)
    again = only_plan(scheduler)
    assert set(again.released) == {chunk.sequence_id for chunk in finished.chunks}, (
        "told once, perhaps not to every stage"
    )
    assert {chunk.sequence_id for chunk in again.chunks}.isdisjoint(again.released)
    scheduler.check_invariants()


def test_releases_outlast_a_pipeline_that_is_closed_before_it_could_tell_them() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a")
    (chunk,) = only_plan(scheduler).chunks
    scheduler.close_pipeline(P0, now_s=0.0)
    scheduler.cancel(build_request("a", 4, 10).request_id)
    for generation in (2, 3):
        open_pipeline(scheduler, P0, Generation(generation), 100, 1, now_s=0.0)
        scheduler.close_pipeline(P0, now_s=0.0)
    open_pipeline(scheduler, P1, Generation(4), 100, 1, now_s=0.0)
    add(scheduler, "b")
    assert only_plan(scheduler).released == (), "the stages of another pipeline know nothing of it"
    scheduler.close_pipeline(P1, now_s=0.0)
    open_pipeline(scheduler, P0, Generation(5), 100, 1, now_s=0.0)
    assert only_plan(scheduler).released == (chunk.sequence_id,)
