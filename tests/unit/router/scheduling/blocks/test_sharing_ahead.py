"""Steps that are planned before their tokens are known, and the cache: what becomes findable, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from common.errors import ExecutionError
from common.ids import Generation, RequestId
from common.messages import AWAITED_TOKEN
from services.router.engine import FinishReason, GenerationRequest, Token
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.step_plan import ComputedBy, StepPlan, TokenOutput
from tests.support.router.scheduling import P0, make_scheduler, only_plan, open_pipeline
from tests.support.router.simulated_pipeline import build_request

CLASS = ComputedBy(7)
STOP, TOKEN = 7, 50


def ask(name: str, *prompt: int, max_tokens: int = 9) -> GenerationRequest:
    """A block holds 4 tokens."""
    request = build_request(name, 1, max_tokens, seed=3 * ord(name), stop_token_ids=frozenset([STOP]))
    return replace(request, prompt_token_ids=prompt)


def caching(*requests: GenerationRequest, num_blocks: int = 100, num_slots: int = 1) -> Scheduler:
    """A scheduler that plans ahead, whose requests have their first token."""
    scheduler = make_scheduler(num_blocks, num_slots, caches_prefixes=True, plans_ahead=True, min_decode_share=8)
    for request in requests:
        scheduler.add(request, 0.0)
    for plan in scheduler.schedule(0.0):
        answer(scheduler, plan)
    return scheduler


def answer(
    scheduler: Scheduler, plan: StepPlan, tokens: Mapping[int, int] | None = None, by: ComputedBy = CLASS
) -> list[TokenOutput]:
    """Answers a step; `tokens` by place in it, else all are TOKEN."""
    sampled = {
        chunk.sequence_id: (Token((tokens or {}).get(place, TOKEN)),)
        for place, chunk in enumerate(plan.chunks)
        if chunk.samples
    }
    outputs = scheduler.complete(plan.step, sampled, 0.0, computed_by=by)
    scheduler.check_invariants()
    return outputs


def num_cached(scheduler: Scheduler) -> int:
    return scheduler.snapshot().num_cached_blocks


def starts(scheduler: Scheduler, request: GenerationRequest) -> int:
    """Returns where a request that comes now begins to be computed, once nothing else is in flight."""
    scheduler.add(request, 0.0)
    for _ in range(20):
        for plan in scheduler.schedule(0.0):
            for chunk in plan.chunks:
                if chunk.sampling.seed == request.sampling.seed:
                    return chunk.start_position
            answer(scheduler, plan)
    raise AssertionError("it does not begin")


def test_a_block_that_a_step_planned_ahead_completes_is_cached_once_that_is_answered_by_the_tokens_it_had() -> None:
    scheduler = caching(ask("a", *range(6)))
    now, ahead = scheduler.schedule(0.0)
    (row,) = ahead.chunks
    assert (row.start_position, row.token_ids) == (7, (AWAITED_TOKEN,)), "it completes the second block"
    answer(scheduler, now, {0: 51})
    assert num_cached(scheduler) == 1
    answer(scheduler, ahead)
    assert num_cached(scheduler) == 2
    assert scheduler.cancel(RequestId("a"))
    assert starts(scheduler, ask("b", *range(6), 50, 51, 1)) == 8
    assert scheduler.cancel(RequestId("b"))
    assert starts(scheduler, ask("c", *range(6), 50, 50, 1)) == 4, "it has another text"


def test_a_block_that_a_row_too_many_completes_is_never_cached_and_is_free_once_that_row_is_back() -> None:
    scheduler = caching(ask("a", *range(6)))
    now, ahead = scheduler.schedule(0.0)
    (output,) = answer(scheduler, now, {0: STOP})
    assert output.token.finish_reason is FinishReason.STOP
    assert scheduler.snapshot().num_free_blocks == 98, "something may still write to them"
    assert answer(scheduler, ahead) == []
    assert (scheduler.snapshot().num_free_blocks, num_cached(scheduler)) == (100, 1)
    assert starts(scheduler, ask("b", *range(6), 50, STOP, 1)) == 4


def test_of_a_cancelled_request_neither_step_in_flight_has_a_block_cached() -> None:
    scheduler = caching(ask("a", *range(6)))
    now, ahead = scheduler.schedule(0.0)
    assert scheduler.cancel(RequestId("a"))
    assert answer(scheduler, now) == answer(scheduler, ahead) == []
    assert (scheduler.snapshot().num_free_blocks, num_cached(scheduler)) == (100, 1)


def test_what_an_ended_request_has_whole_is_shared_while_its_row_too_many_is_in_flight() -> None:
    scheduler = caching(ask("a", *range(7)), ask("x", 90))
    now, ahead = scheduler.schedule(0.0)
    assert [chunk.start_position for chunk in ahead.chunks] == [8, 2], "of the first one it is the first of a block"
    answer(scheduler, now, {0: STOP})
    scheduler.add(ask("b", *range(7), 50, 1), 0.0)
    following = only_plan(scheduler)
    assert following.awaited_step == ahead.step
    assert [(chunk.start_position, chunk.token_ids) for chunk in following.chunks] == [(3, (AWAITED_TOKEN,)), (8, (1,))]
    schedule = scheduler._schedules.all[P0]
    first, second, own = schedule.running[1].block_table
    assert [schedule.allocator.reference_count(block_id) for block_id in (first, second, own)] == [2, 2, 1]
    answer(scheduler, ahead)
    assert [schedule.allocator.reference_count(block_id) for block_id in (first, second, own)] == [1, 1, 1]
    assert [output.token.num_cached_tokens for output in answer(scheduler, following)] == [0, 8]


def test_cached_blocks_that_nobody_holds_are_free_to_a_step_that_is_planned_ahead() -> None:
    scheduler = caching(ask("a", *range(8), max_tokens=1), num_blocks=3)
    assert num_cached(scheduler) == 2
    scheduler.add(ask("b", 90, 91), 0.0)
    answer(scheduler, only_plan(scheduler))
    now, ahead = scheduler.schedule(0.0)
    answer(scheduler, now)
    assert ahead.chunks[0].new_block_ids == ()
    following = only_plan(scheduler)
    assert (following.awaited_step, len(following.chunks[0].new_block_ids)) == (ahead.step, 1)
    assert scheduler.snapshot().counters.prefixes.blocks_evicted == 1
    answer(scheduler, ahead)
    assert scheduler.cancel(RequestId("b"))
    answer(scheduler, following)
    assert starts(scheduler, ask("c", *range(8), 1, max_tokens=1)) == 4, "the end of the chain went first"


def test_where_not_everybody_has_a_block_for_it_nothing_is_planned_ahead() -> None:
    scheduler = caching(ask("a", *range(7)), ask("b", 90, 91, 92), num_blocks=4)
    now = only_plan(scheduler)
    assert ([chunk.start_position for chunk in now.chunks], scheduler.snapshot().num_free_blocks) == ([7, 3], 1)


def test_a_step_is_planned_ahead_of_one_in_which_a_prompt_has_only_its_last_token() -> None:
    scheduler = caching(ask("a", *range(9)), ask("x", 90))
    for plan in scheduler.schedule(0.0):
        answer(scheduler, plan)
    scheduler.add(ask("b", *range(8), 5), 0.0)
    now, ahead = scheduler.schedule(0.0)
    assert [chunk.token_ids for chunk in now.chunks] == [(50,), (50,), (5,)]
    assert (ahead.chunks[2].start_position, ahead.chunks[2].token_ids) == (9, (AWAITED_TOKEN,))


@pytest.mark.parametrize("hurt", ["now", "ahead"])
def test_what_a_step_planned_ahead_computes_behind_a_degraded_row_is_not_cached(hurt: str) -> None:
    scheduler = caching(ask("a", *range(6)))
    now, ahead = scheduler.schedule(0.0)
    degraded = ComputedBy(7, frozenset({now.chunks[0].sequence_id}))
    answer(scheduler, now, by=degraded if hurt == "now" else CLASS)
    answer(scheduler, ahead, by=degraded if hurt == "ahead" else CLASS)
    for _ in range(4):
        scheduler.schedule(0.0)
        answer(scheduler, scheduler.steps_in_flight[0].plan)
    assert num_cached(scheduler) == 1, "but for the block before them"


@pytest.mark.parametrize("number", [0, 8])
def test_what_another_class_computes_ahead_is_not_cached(number: int) -> None:
    scheduler = caching(ask("a", *range(6)))
    now, ahead = scheduler.schedule(0.0)
    answer(scheduler, now)
    answer(scheduler, ahead, by=ComputedBy(number))
    assert num_cached(scheduler) == 1


def test_a_step_whose_tokens_did_not_come_has_no_block_cached_until_it_is_done_again() -> None:
    scheduler = caching(ask("a", *range(6)))
    now, ahead = scheduler.schedule(0.0)
    assert scheduler.complete(now.step, {}, 0.0, computed_by=CLASS) == []
    scheduler.check_invariants()
    assert answer(scheduler, ahead) == []
    assert num_cached(scheduler) == 1
    again = only_plan(scheduler)
    assert (again.chunks[0].start_position, again.chunks[0].token_ids) == (6, (50,))
    answer(scheduler, again, {0: 51})
    answer(scheduler, scheduler.schedule(0.0)[0])
    assert num_cached(scheduler) == 2
    assert scheduler.cancel(RequestId("a"))
    assert starts(scheduler, ask("b", *range(6), 50, 51, 1)) == 8


@pytest.mark.parametrize(("mark", "start"), [(0, 0), (2, 4), (3, 8)])
def test_a_mirror_that_takes_over_keeps_the_blocks_of_steps_up_to_its_mark(mark: int, start: int) -> None:
    """Step 1 has computed the first block, step 3, planned ahead of 2, has completed the second."""
    scheduler = caching(ask("a", *range(6), max_tokens=4), num_slots=2)
    now, ahead = scheduler.schedule(0.0)
    assert (now.step, ahead.step) == (2, 3)
    answer(scheduler, now)
    answer(scheduler, ahead)
    answer(scheduler, only_plan(scheduler))
    scheduler.suspend_pipeline(P0, 0.0)
    open_pipeline(scheduler, P0, Generation(2), 100, 2, 0.0, kv_marks=(9, mark))
    scheduler.check_invariants()
    (canary,) = scheduler.plan_canaries(0.0)
    answer(scheduler, canary)  # by the class that it was
    assert starts(scheduler, ask("b", *range(6), 50, 50, 1)) == start


def test_a_failed_step_ahead_leaves_what_was_whole_before_and_nothing_of_its_own() -> None:
    scheduler = caching(ask("a", *range(6)))
    now, ahead = scheduler.schedule(0.0)
    answer(scheduler, now, {0: STOP})
    scheduler.fail_step(ahead.step, ExecutionError("simulated"), 0.0)
    scheduler.check_invariants()
    assert (scheduler.snapshot().num_free_blocks, num_cached(scheduler)) == (100, 1)
