"""A prompt whose blocks had to make room comes back from the session tier, in steps that may fail like any others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import ExecutionError
from common.ids import Generation
from services.router.engine import GenerationRequest
from services.router.scheduling.blocks import sharing
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.step_plan import ComputedBy, StepPlan
from tests.support.router.scheduling import P0, make_scheduler, open_pipeline
from tests.unit.router.scheduling.blocks.test_sharing import CLASS, alike, answer_canary, finish, go_on, run

OTHER_CLASS = ComputedBy(8)


def other(name: str = "other", length: int = 17) -> GenerationRequest:
    """It needs all five blocks of the pool."""
    return replace(alike(name, max_tokens=1), prompt_token_ids=tuple(range(100, 100 + length)))


def evicted(num_tier_slots: int = 8, num_slots: int = 1) -> Scheduler:
    """Both blocks of `alike` had to make room."""
    scheduler = make_scheduler(5, num_slots, num_tier_slots, caches_prefixes=True)
    run(scheduler, alike("first", max_tokens=1), other())
    return scheduler


def restoring(scheduler: Scheduler) -> StepPlan:
    (plan,) = scheduler.schedule(0.0)
    (chunk,) = plan.chunks
    assert chunk.tier_slots
    return plan


def test_what_had_to_make_room_is_saved_and_comes_back_as_found() -> None:
    scheduler = evicted()
    scheduler.add(alike("second", max_tokens=1), 0.0)
    plan = restoring(scheduler)
    assert plan.restores == ((1, 0), (0, 1)), "what ends a chain has gone first, and the lowest slots fill first"
    assert plan.saves == ((1, 2),), "another makes room for it in turn"
    assert (plan.num_tokens, plan.computed) == (0, ())
    assert scheduler.schedule(0.0) == [], "nothing of it runs beside that"
    scheduler.complete(plan.step, {}, 0.0, computed_by=CLASS)
    scheduler.check_invariants()
    assert finish(scheduler) == ([(8, 1)], 8)
    counters = scheduler.snapshot().counters.prefixes
    assert (counters.blocks_found, counters.tokens_found) == (2, 8)
    assert (counters.tier.blocks_saved, counters.tier.blocks_restored, counters.tier.tokens_restored) == (4, 2, 8)


def test_without_a_tier_it_is_computed_again() -> None:
    assert run(evicted(0), alike("second", max_tokens=1)) == ([(0, 9)], 0)


def test_what_is_in_a_block_is_shared_and_only_the_rest_comes_back() -> None:
    scheduler = make_scheduler(5, num_tier_slots=8, caches_prefixes=True)
    run(scheduler, alike("first", max_tokens=1), other(length=13))  # takes four: the last one of the chain goes
    scheduler.add(alike("second", max_tokens=1), 0.0)
    assert [chunk.start_position for chunk in restoring(scheduler).chunks] == [4]


def test_a_step_brings_back_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "MAX_RESTORED_BLOCKS", 1)
    assert run(evicted(), alike("second", max_tokens=1)) == ([(0, 4), (4, 4), (8, 1)], 8)


def test_who_decodes_goes_on_in_the_same_step() -> None:
    scheduler = make_scheduler(9, num_tier_slots=8, caches_prefixes=True)
    run(scheduler, alike("first", max_tokens=1), other(length=33))
    scheduler.add(replace(alike("decodes", max_tokens=9), prompt_token_ids=(7, 7)), 0.0)
    go_on(scheduler)
    scheduler.add(alike("second", max_tokens=1), 0.0)
    ((plan, _),) = go_on(scheduler)
    assert [(len(chunk.token_ids), bool(chunk.tier_slots)) for chunk in plan.chunks] == [(1, False), (8, True)]
    assert plan.num_tokens == 1
    assert finish(scheduler)[1] == 8


def test_a_step_that_fails_is_done_again_and_after_two_failures_the_prompt_is_computed() -> None:
    scheduler = evicted()
    free = scheduler.snapshot().num_free_blocks
    scheduler.add(alike("second", max_tokens=1), 0.0)
    for generation in (2, 3):
        scheduler.fail_step(restoring(scheduler).step, ExecutionError("simulated"), 0.0)
        assert scheduler.snapshot().num_free_blocks == free, "its blocks are given back"
        scheduler.suspend_pipeline(P0, 0.0)
        open_pipeline(
            scheduler, P0, Generation(generation), 5, 1, 0.0, kv_marks=(10**6,), num_tier_slots=8, tier_since=0
        )
        answer_canary(scheduler, CLASS)
        scheduler.check_invariants()
    assert finish(scheduler) == ([(0, 9)], 0)


def test_one_who_leaves_meanwhile_gives_its_blocks_back_when_the_step_is_answered() -> None:
    scheduler = evicted()
    request = alike("second", max_tokens=1)
    scheduler.add(request, 0.0)
    plan = restoring(scheduler)
    scheduler.cancel(request.request_id)
    assert scheduler.snapshot().num_free_blocks == 3
    scheduler.complete(plan.step, {}, 0.0, computed_by=CLASS)
    assert scheduler.snapshot().num_free_blocks == 5
    scheduler.check_invariants()


@pytest.mark.parametrize(
    ("num_tier_slots", "tier_since", "marks", "is_kept"),
    [
        pytest.param(8, 0, (99, 99), True, id="the same holders"),
        pytest.param(8, 99, (99, 99), False, id="a mirror, whose tier is empty"),
        pytest.param(8, 0, (99, 0), False, id="a new process"),
        pytest.param(7, 0, (99, 99), False, id="a tier of another size"),
    ],
)
def test_a_holder_that_lacks_the_tier_makes_it_empty(
    num_tier_slots: int, tier_since: int, marks: tuple[int, int], is_kept: bool
) -> None:
    scheduler = evicted(num_slots=2)
    scheduler.suspend_pipeline(P0, 0.0)
    open_pipeline(scheduler, P0, Generation(2), 5, 2, 0.0, marks, None, num_tier_slots, tier_since)
    answer_canary(scheduler, CLASS)
    assert run(scheduler, alike("second", max_tokens=1))[1] == (8 if is_kept else 0)


def test_what_comes_back_from_another_class_than_the_one_that_goes_on_is_not_used() -> None:
    scheduler = evicted()
    scheduler.add(alike("second", max_tokens=1), 0.0)
    scheduler.complete(restoring(scheduler).step, {}, 0.0, computed_by=CLASS)
    chunks, found = finish(scheduler, OTHER_CLASS)
    assert (chunks, found) == ([(8, 1), (0, 9)], 0)


def test_a_second_one_waits_for_the_first_and_shares_what_that_gets() -> None:
    scheduler = evicted()
    scheduler.add(alike("second", max_tokens=1), 0.0)
    scheduler.add(alike("third", max_tokens=1), 0.0)
    plan = restoring(scheduler)
    scheduler.complete(plan.step, {}, 0.0, computed_by=CLASS)
    assert finish(scheduler)[1] == 16
    assert scheduler.snapshot().counters.prefixes.tier.blocks_restored == 2
