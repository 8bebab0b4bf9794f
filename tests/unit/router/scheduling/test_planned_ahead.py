"""A decode step that is planned before the tokens that it goes on with are known: when, of what, what comes of it."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ExecutionError
from common.ids import Generation, RequestId
from common.messages import AWAITED_TOKEN
from services.router.engine import FinishReason, GenerationRequest, Token
from services.router.scheduling.pipeline_schedule import UNPLANNED_AHEAD_S
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.step_plan import StepPlan
from tests.support.router.scheduling import (
    P0,
    add,
    complete,
    is_idle,
    make_scheduler,
    names_in,
    only_plan,
    open_pipeline,
)
from tests.support.router.simulated_pipeline import SimulatedPipeline, build_request, reference_tokens

STOP, TOKEN = 7, Token(1)


def decoding(*names: str, num_blocks: int = 100, num_slots: int = 1, max_tokens: int = 10, **changes: Any) -> Scheduler:
    """A scheduler whose requests have their first token, and nothing in flight."""
    scheduler = make_scheduler(num_blocks, num_slots, plans_ahead=True, **changes)
    for name in names:
        request = build_request(name, 4, max_tokens, seed=3 * ord(name), stop_token_ids=frozenset([STOP]))
        scheduler.add(replace(request, sampling=replace(request.sampling, seed=ord(name))), 0.0)
    for plan in scheduler.schedule(0.0):
        complete(scheduler, plan)
    return scheduler


def tokens_in(plan: StepPlan) -> list[int]:
    return [token for chunk in plan.chunks for token in chunk.token_ids]


@pytest.mark.parametrize("num_slots", [1, 2])
def test_what_follows_the_only_step_in_flight_is_planned_with_it_and_refers_to_its_tokens(num_slots: int) -> None:
    scheduler = decoding("a", "b", num_slots=num_slots, min_decode_share=8)
    now, ahead = scheduler.schedule(0.0)
    assert (now.awaited_step, tokens_in(now)) == (0, [1, 1])
    assert (ahead.awaited_step, tokens_in(ahead)) == (now.step, [AWAITED_TOKEN, AWAITED_TOKEN])
    assert [chunk.start_position for chunk in ahead.chunks] == [5, 5]
    assert [chunk.num_generated for chunk in ahead.chunks] == [2, 2]
    assert all(chunk.samples for chunk in ahead.chunks)
    assert scheduler.schedule(0.0) == [], "one step ahead, and no more"
    complete(scheduler, now)
    assert only_plan(scheduler).awaited_step == ahead.step


def test_a_request_whose_last_token_is_under_way_is_not_in_the_step_after_it() -> None:
    scheduler = decoding("a", max_tokens=2)
    add(scheduler, "b")
    first = only_plan(scheduler)
    assert names_in(first) == ["a", "b"]
    complete(scheduler, first)
    now, ahead = scheduler.schedule(0.0)
    assert (names_in(now), names_in(ahead)) == (["b"], ["b"])
    alone = decoding("c", max_tokens=2)
    assert only_plan(alone).awaited_step == 0, "nobody goes on"


def test_of_a_request_that_has_stopped_the_row_too_many_is_no_token_and_keeps_its_blocks_till_it_is_back() -> None:
    scheduler = decoding("a", "b")
    now, ahead = scheduler.schedule(0.0)
    (a, b) = now.chunks
    sampled = {a.sequence_id: (replace(TOKEN, token_id=STOP),), b.sequence_id: (TOKEN,)}
    outputs = scheduler.complete(now.step, sampled, 0.0)
    assert [output.token.finish_reason for output in outputs] == [FinishReason.STOP, None]
    scheduler.check_invariants()
    held = scheduler.snapshot().num_free_blocks
    following = only_plan(scheduler)
    assert (names_in(following), following.released) == (["b"], ())
    outputs = complete(scheduler, ahead)
    assert [output.request_id for output in outputs] == ["b"]
    assert scheduler.snapshot().num_free_blocks == held + 2
    assert scheduler.snapshot().counters.tokens_generated == 5
    complete(scheduler, following)
    assert scheduler.schedule(0.0)[0].released == (a.sequence_id,)


def test_a_cancelled_request_has_blocks_until_both_steps_are_back() -> None:
    scheduler = decoding("a")
    now, ahead = scheduler.schedule(0.0)
    assert scheduler.cancel(RequestId("a"))
    for plan, num_free in ((now, 98), (ahead, 98)):
        assert scheduler.snapshot().num_free_blocks == num_free
        assert complete(scheduler, plan) == []
    assert scheduler.snapshot().num_free_blocks == 100


def test_nothing_is_planned_ahead_of_a_prompt_and_one_that_comes_waits_for_what_is_in_flight() -> None:
    scheduler = decoding("a")
    now, ahead = scheduler.schedule(0.0)
    add(scheduler, "b")
    assert scheduler.schedule(0.0) == []
    complete(scheduler, now)
    assert scheduler.schedule(0.0) == [], "it joins the next step"
    complete(scheduler, ahead)
    assert names_in(only_plan(scheduler)) == ["a", "b"], "of both, and nothing is ahead of a step with a prompt"


def test_of_several_stages_a_step_that_waits_for_tokens_keeps_no_prompt_out() -> None:
    scheduler = decoding("a", num_slots=2, min_decode_share=8)
    now, ahead = scheduler.schedule(0.0)
    add(scheduler, "b")
    prompt = only_plan(scheduler)
    assert names_in(prompt) == ["b"]
    complete(scheduler, now)
    assert scheduler.schedule(0.0) == [], "two steps keep two stages at work"
    complete(scheduler, ahead)
    assert names_in(only_plan(scheduler)) == ["a"]


def test_who_is_ready_joins_those_in_flight_in_the_step_that_is_planned_ahead() -> None:
    scheduler = decoding("a")
    now, ahead = scheduler.schedule(0.0)
    add(scheduler, "b")
    complete(scheduler, now)
    complete(scheduler, ahead)
    complete(scheduler, only_plan(scheduler))
    both, after = scheduler.schedule(0.0)
    assert (names_in(both), names_in(after)) == (["a", "b"], ["a", "b"])


def test_where_decoding_sequences_fill_several_micro_batches_none_is_planned_ahead() -> None:
    scheduler = decoding("a", "b", "c", "d", num_slots=2)
    plans = scheduler.schedule(0.0)
    assert [(len(plan.chunks), plan.awaited_step) for plan in plans] == [(2, 0), (2, 0)]


def test_more_sequences_than_a_step_may_have_are_not_planned_ahead() -> None:
    scheduler = make_scheduler(plans_ahead=True, max_batch_sequences=2)
    add(scheduler, "a", "b", "c")
    complete(scheduler, only_plan(scheduler))
    assert only_plan(scheduler).awaited_step == 0


def test_nothing_is_planned_ahead_while_somebody_waits_for_a_place() -> None:
    scheduler = decoding("a", max_batch_sequences=1)
    add(scheduler, "b")
    assert only_plan(scheduler).awaited_step == 0, "who is in flight gives up neither place nor blocks"


def test_nothing_is_planned_ahead_for_want_of_blocks_and_then_the_youngest_yields() -> None:
    scheduler = decoding("a", "b", num_blocks=4, max_tokens=12)
    plans = scheduler.schedule(0.0)
    for start in (4, 5, 6):  # up to the end of their second block
        plan = plans.pop(0)
        assert plan.chunks[0].start_position == start
        complete(scheduler, plan)
        plans += scheduler.schedule(0.0)
    (last,) = plans
    assert scheduler.schedule(0.0) == [], "nobody who is in flight could give any up"
    complete(scheduler, last)
    assert names_in(scheduler.schedule(0.0)[0]) == ["a"]
    assert scheduler.snapshot().counters.preemptions == 1


def test_before_the_last_stage_is_told_other_biases_a_request_is_not_planned_ahead() -> None:
    """Of one that is too short to end, stop tokens must not be drawn, until its second token."""
    scheduler = make_scheduler(plans_ahead=True)
    request = build_request("a", 4, 10, seed=ord("a"), stop_token_ids=frozenset([STOP]))
    sampling = replace(request.sampling, min_tokens=2, logit_bias=((3, 1.0),))
    scheduler.add(replace(request, sampling=sampling), 0.0)
    complete(scheduler, only_plan(scheduler))
    second = only_plan(scheduler)
    assert (second.chunks[0].num_generated, second.chunks[0].tells_adjustments) == (1, False)
    complete(scheduler, second)
    third, fourth = scheduler.schedule(0.0)
    assert (third.awaited_step, third.chunks[0].tells_adjustments) == (0, True)
    assert (fourth.awaited_step, fourth.chunks[0].tells_adjustments) == (third.step, False)


def test_when_a_step_fails_the_one_ahead_of_it_is_void_and_nothing_is_ahead_until_it_is_done() -> None:
    scheduler = decoding("a", "b")
    now, ahead = scheduler.schedule(0.0)
    scheduler.fail_step(now.step, ExecutionError("x"), 0.0)
    scheduler.check_invariants()
    assert complete(scheduler, ahead) == []
    again = only_plan(scheduler)
    assert (names_in(again), tokens_in(again), again.awaited_step) == (["a"], [1], 0), "suspects go alone"
    assert again.chunks[0].block_offset == 0


def test_a_step_ahead_that_fails_is_done_again_with_the_token_that_is_known_now() -> None:
    scheduler = decoding("a")
    now, ahead = scheduler.schedule(0.0)
    complete(scheduler, now, token_id=5)
    scheduler.fail_step(ahead.step, ExecutionError("x"), 0.0)
    again = only_plan(scheduler)
    assert (tokens_in(again), again.chunks[0].start_position) == ([5], 5)


def test_steps_in_flight_when_a_slot_is_lost_are_planned_again_from_the_last_token_that_came() -> None:
    scheduler = decoding("a", num_slots=2)
    now, _ = scheduler.schedule(0.0)
    complete(scheduler, now, token_id=5)
    scheduler.suspend_pipeline(P0, 0.0)
    scheduler.check_invariants()
    open_pipeline(scheduler, P0, Generation(2), 100, 2, 0.0, kv_marks=(now.step + 1, now.step + 1))
    again, ahead = scheduler.schedule(0.0)
    assert (tokens_in(again), again.chunks[0].start_position, again.awaited_step) == ([5], 5, 0)
    assert ahead.awaited_step == again.step


def test_a_request_without_its_token_is_done_again_once_the_step_ahead_is_back() -> None:
    scheduler = decoding("a", "b")
    now, ahead = scheduler.schedule(0.0)
    scheduler.complete(now.step, {now.chunks[1].sequence_id: (TOKEN,)}, 0.0)
    scheduler.check_invariants()
    assert [output.request_id for output in complete(scheduler, ahead)] == ["b"]
    again = only_plan(scheduler)
    assert (names_in(again), again.chunks[0].start_position) == (["a"], 4)


def test_where_a_step_waited_in_vain_nothing_is_planned_ahead_for_a_while() -> None:
    """The link from the last stage to the first may be cut, and no other one tells of that."""
    scheduler = decoding("a", num_slots=2)
    now, _ = scheduler.schedule(0.0)
    complete(scheduler, now)
    scheduler.suspend_pipeline(P0, 5.0)
    open_pipeline(scheduler, P0, Generation(2), 100, 2, 5.0, kv_marks=(now.step, now.step))
    plan = only_plan(scheduler, 5.0)
    complete(scheduler, plan, now_s=5.0)
    complete(scheduler, only_plan(scheduler, 4.9 + UNPLANNED_AHEAD_S), now_s=4.9 + UNPLANNED_AHEAD_S)
    assert len(scheduler.schedule(5.0 + UNPLANNED_AHEAD_S)) == 2


def test_it_waited_in_vain_also_where_one_behind_it_is_overdue_first() -> None:
    scheduler = decoding("a", num_slots=2, min_decode_share=8)
    now, ahead = scheduler.schedule(0.0)
    add(scheduler, "b")
    behind = only_plan(scheduler, 0.0)
    assert ahead.awaited_step == now.step
    complete(scheduler, now, now_s=4.5)
    assert behind.awaited_step == 0
    scheduler.suspend_pipeline(P0, 5.0)
    open_pipeline(scheduler, P0, Generation(2), 100, 2, 5.0, kv_marks=(now.step, now.step))
    for plan in scheduler.schedule(5.0):
        complete(scheduler, plan, now_s=5.0)
    assert names_in(only_plan(scheduler, 5.0)) == ["a", "b"]


def test_a_step_ahead_is_timed_from_when_its_tokens_were_there() -> None:
    scheduler = decoding("a")
    now, ahead = scheduler.schedule(0.0)
    complete(scheduler, now, now_s=3.0)
    (step,) = scheduler.steps_in_flight
    assert (step.plan, step.planned_s) == (ahead, 3.0)


# ---- nothing but time is different

REQUESTS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(0, 40), st.booleans()), min_size=1, max_size=5
)


def run(requests: list[GenerationRequest], num_slots: int, num_blocks: int, **changes: Any) -> dict[int, list[Any]]:
    """Returns by request what stages computed of it, as far as its tokens go: positions, and what they were told."""
    scheduler = make_scheduler(num_blocks, num_slots, **changes)
    stages = SimulatedPipeline(P0, Generation(1), num_blocks, 4)
    for request in requests:
        scheduler.add(request, 0.0)
    in_flight: deque[StepPlan] = deque()
    computed: dict[int, list[Any]] = {request.sampling.seed: [] for request in requests}
    tokens: dict[RequestId, list[int]] = {request.request_id: [] for request in requests}
    for _ in range(500):
        for plan in scheduler.schedule(0.0):
            stages.deliver(plan)
            in_flight.append(plan)
        scheduler.check_invariants()
        if is_idle(scheduler):
            break
        plan = in_flight.popleft()
        sampled = stages.answer(plan)
        for output in scheduler.complete(plan.step, sampled, 0.0):
            tokens[output.request_id].append(output.token.token_id)
        for chunk in plan.chunks:
            told = (chunk.tells_adjustments, chunk.token_counts, chunk.num_generated)
            computed[chunk.sampling.seed].append((chunk.start_position, len(chunk.token_ids), chunk.samples, told))
    assert is_idle(scheduler)
    for request in requests:
        expected = reference_tokens(request)
        assert tokens[request.request_id] == expected
        own = computed[request.sampling.seed]
        computed[request.sampling.seed] = [entry for entry in own if entry[3][2] < len(expected)]
    return computed


@settings(max_examples=150, deadline=None)
@given(
    shapes=REQUESTS,
    num_slots=st.integers(1, 3),
    share=st.sampled_from([1, 8]),
    max_batch_sequences=st.integers(1, 6),
)
def test_planned_ahead_or_not_stages_compute_the_same_and_every_request_gets_the_same_tokens(
    shapes: list[tuple[int, int, int, bool]], num_slots: int, share: int, max_batch_sequences: int
) -> None:
    requests = [
        build_request(
            f"r{number}", length, max_tokens, seed=seed * 5 + number,
            stop_token_ids=frozenset(range(0, 97, 5)) if stops else frozenset(),
        )
        for number, (length, max_tokens, seed, stops) in enumerate(shapes)
    ]  # fmt: skip
    changes = {"min_decode_share": share, "max_batch_sequences": max_batch_sequences}
    plain = run(requests, num_slots, 60, plans_ahead=False, **changes)
    assert run(requests, num_slots, 60, plans_ahead=True, **changes) == plain
