"""A prompt whose blocks had to make room comes back from the session tier, in steps that may fail like any others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import ExecutionError
from common.ids import Generation, RequestId
from services.router.engine import GenerationRequest, Token
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


def test_one_whose_blocks_did_not_come_back_may_be_computed_by_another_class_and_is_found_under_that() -> None:
    scheduler = evicted()
    scheduler.add(alike("second", max_tokens=1), 0.0)
    scheduler.fail_step(restoring(scheduler).step, ExecutionError("simulated"), 0.0)
    scheduler.suspend_pipeline(P0, 0.0)
    open_pipeline(scheduler, P0, Generation(2), 5, 1, 0.0, kv_marks=(10**6,), num_tier_slots=8, tier_since=0)
    answer_canary(scheduler, OTHER_CLASS)
    assert finish(scheduler, OTHER_CLASS) == ([(0, 9)], 0)
    scheduler.add(alike("third", max_tokens=1), 0.0)
    assert finish(scheduler, OTHER_CLASS) == ([(8, 1)], 8)


def test_all_that_come_back_at_once_share_what_a_step_may_bring_back() -> None:
    num_prompts, length = 6, 4 * 33 + 1
    scheduler = make_scheduler(
        num_prompts * 40, 2, 2000, caches_prefixes=True, max_batch_tokens=64, prefill_chunk_tokens=64
    )
    prompts = [prompt_from(10_000 * number, length) for number in range(1, num_prompts + 1)]
    run(scheduler, *(replace(prompt, request_id=RequestId(f"cold {n}")) for n, prompt in enumerate(prompts)))
    run(scheduler, *(prompt_from(1_000_000 + 10_000 * number, 4 * 130) for number in range(3)))
    for prompt in prompts:
        scheduler.add(prompt, 0.0)
    while plans := scheduler.schedule(0.0):
        scheduler.check_invariants()
        for plan in plans:
            assert len(plan.restores) <= sharing.MAX_RESTORED_BLOCKS
            complete_all(scheduler, plan)
    assert scheduler.snapshot().counters.prefixes.tier.blocks_restored == num_prompts * 33


def prompt_from(first: int, length: int) -> GenerationRequest:
    return replace(alike(f"from {first}", max_tokens=1), prompt_token_ids=tuple(range(first, first + length)))


def complete_all(scheduler: Scheduler, plan: StepPlan) -> None:
    sampled = {chunk.sequence_id: (Token(1),) for chunk in plan.chunks if chunk.samples}
    scheduler.complete(plan.step, sampled, 0.0, computed_by=CLASS)


def test_a_long_prompt_that_comes_back_shows_that_its_pipeline_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "MAX_RESTORED_BLOCKS", 1)
    scheduler = evicted()
    scheduler.add(replace(alike("waits", max_tokens=1), prompt_token_ids=(*alike("x").prompt_token_ids, 7)), 1.0)
    scheduler.add(alike("second", max_tokens=1), 1.0)
    for now_s in (1.0, 3.0):
        (plan,) = scheduler.schedule(now_s)
        assert plan.restores
        scheduler.complete(plan.step, {}, now_s + 1.0, computed_by=CLASS)
        token = scheduler.snapshot().pipelines[0].token
        assert token is not None
        assert token.since_s == now_s + 1.0
