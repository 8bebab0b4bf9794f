"""Chunks of one prompt in flight together: who runs ahead, in which order, and what becomes of them."""

from common.errors import ExecutionError
from common.ids import Generation, RequestId
from services.router.scheduling.step_plan import StepPlan
from tests.support.router.scheduling import (
    P0,
    add,
    complete,
    lengths_in,
    make_scheduler,
    names_in,
    only_plan,
    open_pipeline,
)


def starts_in(plan: StepPlan) -> list[int]:
    return [chunk.start_position for chunk in plan.chunks]


def test_chunks_of_a_lone_prompt_fill_the_micro_batches_in_order() -> None:
    scheduler = make_scheduler(num_slots=4, prefill_chunk_tokens=8)
    add(scheduler, "a", prompt_length=20)
    plans = scheduler.schedule(0.0)
    assert [(*starts_in(plan), *lengths_in(plan)) for plan in plans] == [(0, 8), (8, 8), (16, 4)]
    assert [plan.chunks[0].samples for plan in plans] == [False, False, True]
    assert [plan.chunks[0].block_offset for plan in plans] == [0, 2, 4]
    assert [plan.previous_step for plan in plans] == [0, plans[0].step, plans[1].step]
    assert scheduler.schedule(0.0) == [], "its first token is not known yet"
    tokens = [len(complete(scheduler, plan)) for plan in plans]
    assert tokens == [0, 0, 1]
    assert starts_in(only_plan(scheduler)) == [20]


def test_as_many_chunks_are_in_flight_as_steps_may_be() -> None:
    scheduler = make_scheduler(num_slots=2, micro_batches_per_pipeline=2, prefill_chunk_tokens=4)
    add(scheduler, "a", prompt_length=20)
    first, second = scheduler.schedule(0.0)
    assert scheduler.schedule(0.0) == []
    complete(scheduler, first)
    assert starts_in(only_plan(scheduler)) == [8]
    complete(scheduler, second)
    assert starts_in(only_plan(scheduler)) == [12]


def test_one_more_chunk_than_there_are_stages_is_in_flight_while_nothing_decodes() -> None:
    scheduler = make_scheduler(num_slots=1, prefill_chunk_tokens=8)
    add(scheduler, "a", prompt_length=24, max_tokens=9)
    plans = scheduler.schedule(0.0)
    assert [starts_in(plan) for plan in plans] == [[0], [8]]
    for plan in plans:
        complete(scheduler, plan)
    complete(scheduler, only_plan(scheduler))
    add(scheduler, "b", prompt_length=24)
    assert names_in(only_plan(scheduler)) == ["a", "b"]


def test_the_setting_bounds_also_the_steps_of_prompts() -> None:
    scheduler = make_scheduler(num_slots=1, prefill_chunk_tokens=8, micro_batches_per_pipeline=1)
    add(scheduler, "a", prompt_length=24)
    assert starts_in(only_plan(scheduler)) == [0]


def test_a_prompt_runs_ahead_only_while_no_other_waits_for_its_turn() -> None:
    scheduler = make_scheduler(num_slots=2, micro_batches_per_pipeline=2, prefill_chunk_tokens=4)
    add(scheduler, "a", "b", prompt_length=12)
    first, second = scheduler.schedule(0.0)
    assert (names_in(first), names_in(second)) == (["a"], ["b"])
    complete(scheduler, second)
    assert names_in(only_plan(scheduler)) == ["b"]


def test_those_that_decode_go_with_every_round_beside_a_prompt_that_runs_ahead() -> None:
    scheduler = make_scheduler(num_slots=2, prefill_chunk_tokens=4, min_decode_share=8)
    add(scheduler, "d", prompt_length=1)
    complete(scheduler, only_plan(scheduler))
    add(scheduler, "a", prompt_length=40)
    for _ in range(4):
        plans = scheduler.schedule(0.0)
        assert [names_in(plan) for plan in plans] == [["d", "a"], ["a"]]
        for plan in plans:
            complete(scheduler, plan)


def test_a_request_that_is_cancelled_keeps_its_blocks_until_its_last_step_has_come_back() -> None:
    scheduler = make_scheduler(num_slots=2, micro_batches_per_pipeline=2, prefill_chunk_tokens=8)
    add(scheduler, "a", prompt_length=40)
    first, second = scheduler.schedule(0.0)
    scheduler.cancel(RequestId("a"))
    scheduler.check_invariants()
    for plan, num_free in ((first, 96), (second, 100)):
        assert scheduler.snapshot().num_free_blocks == 96
        complete(scheduler, plan)
        assert scheduler.snapshot().num_free_blocks == num_free
    add(scheduler, "b")
    assert only_plan(scheduler).released == (first.chunks[0].sequence_id,)


def test_a_failed_step_takes_the_others_along_and_all_is_done_again_from_where_the_cache_ends() -> None:
    scheduler = make_scheduler(num_slots=3, micro_batches_per_pipeline=3, prefill_chunk_tokens=8)
    add(scheduler, "a", prompt_length=32)
    first, second, third = scheduler.schedule(0.0)
    complete(scheduler, first)
    scheduler.fail_step(second.step, ExecutionError("x"), 0.0)
    scheduler.check_invariants()
    assert complete(scheduler, third) == [], "it is void"
    again = only_plan(scheduler)
    assert (starts_in(again), again.chunks[0].block_offset) == ([8], 0)
    assert again.chunks[0].new_block_ids[:2] == first.chunks[0].new_block_ids, "the blocks are kept"
    assert scheduler.schedule(0.0) == [], "what has broken a step goes one at a time"
    complete(scheduler, again)
    assert starts_in(only_plan(scheduler)) == [16]


def test_only_the_requests_of_the_failed_step_are_charged_for_it() -> None:
    scheduler = make_scheduler(num_slots=2, max_failed_steps=0)
    add(scheduler, "a", "b")
    first, _ = scheduler.schedule(0.0)
    scheduler.fail_step(first.step, ExecutionError("x"), 0.0)
    assert [failure.request_id for failure in scheduler.pop_failures()] == ["a"]
    assert names_in(only_plan(scheduler)) == ["b"]


def test_chunks_in_flight_when_a_slot_is_lost_are_computed_after_what_the_new_holder_lacks() -> None:
    scheduler = make_scheduler(num_slots=2, micro_batches_per_pipeline=2, prefill_chunk_tokens=8)
    add(scheduler, "a", prompt_length=40)
    first, _ = scheduler.schedule(0.0)
    complete(scheduler, first)
    scheduler.schedule(0.0)
    scheduler.suspend_pipeline(P0, 0.0)
    scheduler.check_invariants()
    open_pipeline(scheduler, P0, Generation(2), 100, 2, 0.0, kv_marks=(first.step + 2, 0))
    replay = only_plan(scheduler)
    assert (replay.computing_slots, starts_in(replay), lengths_in(replay)) == ((1,), [0], [8])
    complete(scheduler, replay)
    assert [starts_in(plan) for plan in scheduler.schedule(0.0)] == [[8], [16]]


def test_a_request_that_is_ahead_waits_for_its_next_answer_from_when_the_last_one_came() -> None:
    scheduler = make_scheduler(num_slots=2, prefill_chunk_tokens=8)
    add(scheduler, "a", prompt_length=16)
    first, _ = scheduler.schedule(0.0)
    complete(scheduler, first, now_s=5.0)
    (evidence,) = scheduler.snapshot().pipelines
    assert evidence.token is not None
    assert evidence.token.since_s == 5.0
