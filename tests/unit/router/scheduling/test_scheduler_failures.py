"""Steps that fail, and what becomes of their requests."""

import pytest

from common.errors import (
    ExecutionError,
    NotReadyError,
)
from common.ids import Generation
from services.router.engine import Token
from tests.support.router.scheduling import (
    P0,
    add,
    complete,
    is_idle,
    lengths_in,
    make_scheduler,
    names_in,
    only_plan,
    open_pipeline,
)

# Failing


def test_releases_of_a_failed_step_are_told_again_since_not_every_stage_may_have_heard_them() -> None:
    scheduler = make_scheduler(max_batch_sequences=2)
    add(scheduler, "a", max_tokens=1)
    add(scheduler, "b")
    first = only_plan(scheduler)
    complete(scheduler, first)
    plan = only_plan(scheduler)
    assert plan.released == (first.chunks[0].sequence_id,)
    scheduler.fail_step(plan.step, ExecutionError("x"), 0.0)
    scheduler.suspend_pipeline(P0, 0.0)
    open_pipeline(scheduler, P0, Generation(2), 100, 1, 0.0, kv_marks=(first.step,))
    assert only_plan(scheduler).released == plan.released


def test_failed_step_is_done_again_and_after_a_second_failure_all_is_recomputed() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a")
    complete(scheduler, only_plan(scheduler), token_id=5)
    failed = only_plan(scheduler)
    scheduler.fail_step(failed.step, ExecutionError("x"), 0.0)
    assert scheduler.pop_failures() == []
    plan = only_plan(scheduler)
    assert lengths_in(plan) == [1]
    assert plan.chunks[0].block_offset == 0, "nobody knows which blocks the stages were told"
    scheduler.fail_step(plan.step, ExecutionError("x"), 0.0)
    assert scheduler.pop_failures() == []
    plan = only_plan(scheduler)
    assert lengths_in(plan) == [5]
    assert plan.released == (failed.chunks[0].sequence_id,)
    assert [output.token.token_id for output in complete(scheduler, plan, token_id=6)] == [6]


def test_request_fails_after_three_recomputations_without_a_new_token() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a")
    error = ExecutionError("poisoned")
    for attempt in range(4):
        plan = only_plan(scheduler)
        scheduler.fail_step(plan.step, error, 0.0)
        assert [failure.error for failure in scheduler.pop_failures()] == ([error] if attempt == 3 else [])
    assert is_idle(scheduler)
    assert scheduler.snapshot().num_free_blocks == 100


@pytest.mark.parametrize(("num_requests", "shares"), [(3, [3]), (4, [4]), (6, [4, 2]), (8, [4, 4]), (10, [5, 5])])
def test_few_decoding_sequences_stay_in_one_micro_batch(num_requests: int, shares: list[int]) -> None:
    scheduler = make_scheduler(num_slots=2, min_decode_share=4)
    add(scheduler, *"abcdefghij"[:num_requests])
    for plan in scheduler.schedule(0.0):
        complete(scheduler, plan)
    assert [len(plan.chunks) for plan in scheduler.schedule(0.0)] == shares


def test_few_decoding_sequences_that_come_at_different_times_meet_in_one_micro_batch() -> None:
    scheduler = make_scheduler(num_slots=2, min_decode_share=4)
    add(scheduler, "a", max_tokens=9)
    complete(scheduler, only_plan(scheduler))
    first = only_plan(scheduler)
    add(scheduler, "b", max_tokens=9)
    complete(scheduler, only_plan(scheduler))
    assert scheduler.schedule(0.0) == [], "a step of its own for b would read all weights once more"
    complete(scheduler, first)
    assert names_in(only_plan(scheduler)) == ["a", "b"]


def test_decoding_sequences_that_are_enough_for_two_micro_batches_do_not_wait_for_each_other() -> None:
    scheduler = make_scheduler(num_slots=2, min_decode_share=1)
    add(scheduler, "a", max_tokens=9)
    complete(scheduler, only_plan(scheduler))
    only_plan(scheduler)
    add(scheduler, "b", max_tokens=9)
    complete(scheduler, only_plan(scheduler))
    assert names_in(only_plan(scheduler)) == ["b"]


def test_decoding_sequences_that_no_step_can_hold_together_take_turns() -> None:
    scheduler = make_scheduler(num_slots=2, max_batch_sequences=2, min_decode_share=8)
    add(scheduler, *"abcd", max_tokens=9)
    decoded: set[str] = set()
    for _ in range(6):
        for plan in scheduler.schedule(0.0):
            decoded.update(names_in(plan))
            complete(scheduler, plan)
    assert decoded == set("abcd")
    plans = scheduler.schedule(0.0)
    assert [len(plan.chunks) for plan in plans] == [2, 2]


def test_sequences_that_go_alone_after_a_failure_wait_for_nobody() -> None:
    scheduler = make_scheduler(num_slots=2, min_decode_share=8)
    add(scheduler, *"abcd", max_tokens=9)
    for plan in scheduler.schedule(0.0):
        complete(scheduler, plan)
    scheduler.fail_step(only_plan(scheduler).step, ExecutionError("x"), 0.0)
    assert [len(plan.chunks) for plan in scheduler.schedule(0.0)] == [1, 1]


def test_one_that_goes_alone_and_finds_no_blocks_does_not_keep_the_others_from_going_on() -> None:
    scheduler = make_scheduler(num_blocks=8, block_tokens=2, prefill_chunk_tokens=4, num_slots=2)
    add(scheduler, "a", prompt_length=4, max_tokens=12)
    complete(scheduler, only_plan(scheduler))
    decode = only_plan(scheduler)
    add(scheduler, "s", prompt_length=8, max_tokens=1)
    chunk = only_plan(scheduler)
    assert names_in(chunk) == ["s"]
    complete(scheduler, decode)
    scheduler.fail_step(chunk.step, ExecutionError("x"), 0.0)
    chunk, decode = scheduler.schedule(0.0)
    assert [names_in(chunk), names_in(decode)] == [["s"], ["a"]]
    while scheduler.snapshot().num_free_blocks:  # the older one takes what is left while the younger goes alone
        complete(scheduler, decode)
        decode = only_plan(scheduler)
    complete(scheduler, chunk)
    complete(scheduler, decode)
    while plans := scheduler.schedule(0.0):
        for plan in plans:
            complete(scheduler, plan)
    assert is_idle(scheduler), "both end"


def test_wait_without_any_open_pipeline_has_an_end_of_its_own() -> None:
    scheduler = make_scheduler(max_outage_s=30.0, max_queue_s=600.0)
    add(scheduler, "a")
    only_plan(scheduler)
    scheduler.close_pipeline(P0, now_s=10.0)
    assert scheduler.schedule(40.0) == []
    assert scheduler.pop_failures() == []
    assert scheduler.schedule(40.1) == []
    (failure,) = scheduler.pop_failures()
    assert isinstance(failure.error, NotReadyError)
    assert is_idle(scheduler)


def test_request_that_breaks_its_steps_takes_no_other_along() -> None:
    scheduler = make_scheduler(micro_batches_per_pipeline=1)
    add(scheduler, "a", "b", "c", max_tokens=2)
    ended: list[str] = []
    for _ in range(20):
        if is_idle(scheduler):
            break
        plan = only_plan(scheduler)
        if "b" in names_in(plan):
            scheduler.fail_step(plan.step, ExecutionError("poisoned"), 0.0)
            ended += [f"{failure.request_id} failed" for failure in scheduler.pop_failures()]
        else:
            outputs = complete(scheduler, plan)
            ended += [f"{output.request_id} finished" for output in outputs if output.token.finish_reason]
    assert sorted(ended) == ["a finished", "b failed", "c finished"]


def test_new_token_forgives_failed_steps() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a")
    for _ in range(3):
        for _ in range(3):
            plan = only_plan(scheduler)
            scheduler.fail_step(plan.step, ExecutionError("x"), 0.0)
            assert not scheduler.pop_failures()
        complete(scheduler, only_plan(scheduler))


def test_missing_token_counts_as_a_failed_step_of_that_request() -> None:
    scheduler = make_scheduler(max_failed_steps=0)
    add(scheduler, "a", "b")
    plan = only_plan(scheduler)
    sampled = {plan.chunks[1].sequence_id: (Token(3),)}
    outputs = scheduler.complete(plan.step, sampled, 0.0)
    assert [output.request_id for output in outputs] == ["b"]
    (failure,) = scheduler.pop_failures()
    assert (failure.request_id, type(failure.error)) == ("a", ExecutionError)
    assert scheduler.pop_failures() == []
