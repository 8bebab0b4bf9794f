from __future__ import annotations

from collections.abc import Callable

import pytest

from common.errors import (
    CapacityError,
    ConfigurationError,
    ContextLengthError,
    DeadlineError,
    ExecutionError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
)
from common.ids import Generation, PipelineId, RequestId, SequenceId, StepId
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from tests.support.router.scheduling import (
    P0,
    P1,
    add,
    complete,
    is_idle,
    lengths_in,
    make_scheduler,
    names_in,
    only_plan,
    open_pipeline,
)
from tests.support.router.simulated_pipeline import build_request, end_of


# Chunks and budgets
def test_long_prompt_is_prefilled_in_chunks_and_sampled_once_at_its_end() -> None:
    scheduler = make_scheduler(prefill_chunk_tokens=6, micro_batches_per_pipeline=1)
    add(scheduler, "a", prompt_length=15)
    seen = []
    for _ in range(3):
        plan = only_plan(scheduler)
        (chunk,) = plan.chunks
        seen.append(
            (chunk.start_position, len(chunk.token_ids), chunk.block_offset, chunk.new_block_ids, chunk.samples)
        )
        outputs = complete(scheduler, plan)
    assert seen == [(0, 6, 0, (0, 1), False), (6, 6, 2, (2,), False), (12, 3, 3, (3,), True)]
    assert [output.request_id for output in outputs] == ["a"]
    (decode,) = only_plan(scheduler).chunks
    assert (decode.token_ids, decode.start_position, decode.new_block_ids, decode.num_generated) == ((1,), 15, (), 1)
    assert end_of(decode) == 16


def test_decodes_come_before_prefill_chunks_in_the_budget() -> None:
    scheduler = make_scheduler(max_batch_tokens=8, prefill_chunk_tokens=8)
    add(scheduler, "a", "b")
    complete(scheduler, only_plan(scheduler))
    add(scheduler, "c", prompt_length=20)
    plan = only_plan(scheduler)
    assert (names_in(plan), lengths_in(plan)) == (["a", "b", "c"], [1, 1, 6])


def test_oldest_prefill_gets_a_token_however_many_younger_decode() -> None:
    scheduler = make_scheduler(max_batch_tokens=2, num_slots=2)
    add(scheduler, "a", prompt_length=8)
    add(scheduler, "b", "c", "d", prompt_length=1)
    plans = scheduler.schedule(0.0)
    assert "a" in names_in(plans[0])


def test_step_takes_no_more_sequences_than_set() -> None:
    scheduler = make_scheduler(max_batch_sequences=2)
    add(scheduler, "a", "b", "c", prompt_length=1)
    assert names_in(only_plan(scheduler)) == ["a", "b"]


def test_last_token_of_all_is_not_computed() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", max_tokens=2)
    complete(scheduler, only_plan(scheduler))
    assert complete(scheduler, only_plan(scheduler))[0].token.finish_reason == "length"
    assert scheduler.schedule(0.0) == []
    assert is_idle(scheduler)


# Micro-batches
def test_decodes_are_shared_out_over_the_micro_batches() -> None:
    scheduler = make_scheduler(num_slots=3)
    add(scheduler, *"abcdefg", prompt_length=1)
    plans = scheduler.schedule(0.0)
    assert [names_in(plan) for plan in plans] == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert scheduler.schedule(0.0) == []  # the cap


def test_a_sequence_that_decodes_is_in_one_step_at_a_time() -> None:
    scheduler = make_scheduler(num_slots=4)
    add(scheduler, "a")
    assert len(scheduler.schedule(0.0)) == 1
    assert scheduler.schedule(0.0) == []


def test_micro_batches_setting_overrides_the_number_of_slots() -> None:
    scheduler = make_scheduler(num_slots=1, micro_batches_per_pipeline=2)
    add(scheduler, "a", "b")
    assert [names_in(plan) for plan in scheduler.schedule(0.0)] == [["a"], ["b"]]


def test_answers_may_come_out_of_order() -> None:
    scheduler = make_scheduler(num_slots=2)
    add(scheduler, "a", "b")
    first, second = scheduler.schedule(0.0)
    assert [output.request_id for output in complete(scheduler, second)] == ["b"]
    assert names_in(only_plan(scheduler)) == ["b"]
    assert [output.request_id for output in complete(scheduler, first)] == ["a"]


# Several pipelines
def test_requests_are_dealt_out_over_pipelines() -> None:
    scheduler = make_scheduler()
    open_pipeline(scheduler, P1, Generation(1), 100, 1, now_s=0.0)
    add(scheduler, *"abcd")
    assert [(plan.pipeline, names_in(plan)) for plan in scheduler.schedule(0.0)] == [(0, ["a", "c"]), (1, ["b", "d"])]


def test_nobody_overtakes_except_on_a_pool_too_small_for_the_one_ahead() -> None:
    scheduler = make_scheduler(num_blocks=10, micro_batches_per_pipeline=1)
    open_pipeline(scheduler, P1, Generation(1), 3, 1, now_s=0.0)
    add(scheduler, "a", prompt_length=28, max_tokens=1)
    scheduler.schedule(0.0)
    add(scheduler, "b", prompt_length=28, max_tokens=1)  # fits pipeline 0 alone, which is full
    add(scheduler, "c", prompt_length=2, max_tokens=1)
    assert [(plan.pipeline, names_in(plan)) for plan in scheduler.schedule(0.0)] == [(1, ["c"])]
    add(scheduler, "d", prompt_length=2, max_tokens=1)
    assert scheduler.schedule(0.0) == []


def test_closed_pipeline_gives_its_requests_back_to_the_head_of_the_line() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", "b")
    complete(scheduler, only_plan(scheduler), token_id=5)
    scheduler.schedule(0.0)
    add(scheduler, "c")
    scheduler.close_pipeline(P0, 1.0)
    assert scheduler.schedule(1.0) == []
    open_pipeline(scheduler, P0, Generation(2), 100, 1, now_s=2.0)
    plan = only_plan(scheduler, 2.0)
    assert (names_in(plan), lengths_in(plan)) == (["a", "b", "c"], [5, 5, 4])
    assert plan.chunks[0].token_ids[-1] == 5
    assert plan.chunks[0].num_generated == 1
    assert plan.released == (1, 2), "their former cache"


def test_answers_of_steps_that_are_not_in_flight_change_nothing() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a")
    old = only_plan(scheduler)
    open_pipeline(scheduler, P0, Generation(2), 100, 1, now_s=0.0)
    new = only_plan(scheduler)
    assert complete(scheduler, old) == []
    scheduler.fail_step(old.step, ExecutionError("late"), 0.0)
    assert scheduler.pop_failures() == []
    assert scheduler.complete(StepId(new.step + 100), {}, 0.0) == []
    assert len(complete(scheduler, new)) == 1
    assert complete(scheduler, new) == []  # the same answer twice


def test_pipeline_opens_only_in_a_newer_generation() -> None:
    scheduler = make_scheduler()
    with pytest.raises(ValueError, match="is open in generation 1"):
        open_pipeline(scheduler, P0, Generation(1), 100, 1, now_s=0.0)


# Preemption
def test_youngest_is_preempted_and_keeps_its_place_in_line() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, "a", "b", prompt_length=7, max_tokens=8)  # two blocks each: full
    complete(scheduler, only_plan(scheduler))  # 8 tokens each
    add(scheduler, "c", prompt_length=1, max_tokens=1)
    complete(scheduler, only_plan(scheduler))  # 9 tokens each: a third block
    plan = only_plan(scheduler)
    assert names_in(plan) == ["a"]
    assert scheduler.counters.preemptions == 1
    sequence_of_b = SequenceId(2)
    assert plan.released == (sequence_of_b,)
    assert scheduler.snapshot().num_waiting == 2
    seen = []
    while not is_idle(scheduler):
        complete(scheduler, plan)
        plans = scheduler.schedule(0.0)
        if plans:
            (plan,) = plans
            seen += [name for name in names_in(plan) if name not in seen]
    assert seen == ["a", "b", "c"]


def test_who_gave_blocks_up_for_a_chunk_is_not_in_the_same_step() -> None:
    # One chunk of the oldest takes the blocks of two who decode, and who were picked for the same step.
    scheduler = make_scheduler(num_blocks=23, max_batch_tokens=40, prefill_chunk_tokens=20)
    for name, prompt_length in (("a", 80), ("b", 3), ("c", 3), ("d", 1)):
        scheduler.add(build_request(name, prompt_length, 8, seed=ord(name)), now_s=0.0)
    victims = 0
    for _ in range(200):
        for plan in scheduler.schedule(0.0):
            assert {chunk.sequence_id for chunk in plan.chunks}.isdisjoint(plan.released)
            victims = max(victims, len(plan.released))
            complete(scheduler, plan)
        if is_idle(scheduler):
            break
    assert is_idle(scheduler)
    assert scheduler.counters.preemptions
    assert victims == 2


def test_preempted_request_comes_back_under_another_sequence_id() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, "a", "b", prompt_length=7, max_tokens=8)
    ids: dict[str, set[SequenceId]] = {"a": set(), "b": set()}
    while not is_idle(scheduler):
        for plan in scheduler.schedule(0.0):
            for name, chunk in zip(names_in(plan), plan.chunks, strict=True):
                ids[name].add(chunk.sequence_id)
            complete(scheduler, plan)
    assert (len(ids["a"]), len(ids["b"])) == (1, 2)


# Cancelling
def test_the_wait_for_a_first_place_is_counted_once_a_request() -> None:
    scheduler = make_scheduler(num_blocks=2)
    add(scheduler, "a", max_tokens=4)
    plan = only_plan(scheduler, now_s=0.25)
    assert (sum(scheduler.snapshot().counters.waits.counts), scheduler.snapshot().counters.waits.total_s) == (1, 0.25)
    complete(scheduler, plan, now_s=1.0)
    scheduler.close_pipeline(P0, now_s=1.0)
    open_pipeline(scheduler, P0, Generation(2), 2, 1, now_s=3.0)
    only_plan(scheduler, now_s=3.0)
    restored = make_scheduler()
    restored.add(build_request("r", 4, 4, seed=1).restored([5]), now_s=0.0)
    only_plan(restored, now_s=2.0)
    assert (scheduler.snapshot().counters.waits.total_s, restored.snapshot().counters.waits.total_s) == (0.25, 0.0)


def test_cancelled_waiting_request_is_gone() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a")
    assert scheduler.cancel(RequestId("a"))
    assert not scheduler.cancel(RequestId("a"))
    assert scheduler.schedule(0.0) == []
    assert is_idle(scheduler)


def test_blocks_of_a_request_cancelled_in_flight_are_free_when_the_step_lands() -> None:
    scheduler = make_scheduler(num_blocks=10)
    add(scheduler, "a")
    plan = only_plan(scheduler)
    scheduler.cancel(RequestId("a"))
    scheduler.check_invariants()
    assert scheduler.snapshot().num_free_blocks == 9
    assert complete(scheduler, plan) == []
    assert scheduler.snapshot().num_free_blocks == 10
    assert is_idle(scheduler)


def test_id_of_an_ended_request_can_be_used_again() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a")
    with pytest.raises(InvalidRequestError, match="in use"):
        add(scheduler, "a")
    only_plan(scheduler)
    scheduler.cancel(RequestId("a"))
    add(scheduler, "a")


# Releases
def test_release_waits_for_the_next_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", "b", max_tokens=1)
    plan = only_plan(scheduler)
    complete(scheduler, plan)
    assert scheduler.schedule(0.0) == []
    add(scheduler, "c")
    assert only_plan(scheduler).released == tuple(chunk.sequence_id for chunk in plan.chunks)


def test_too_many_held_releases_go_in_a_step_of_their_own() -> None:
    scheduler = make_scheduler(max_held_releases=1)
    add(scheduler, "a", "b", max_tokens=1)
    complete(scheduler, only_plan(scheduler))
    plan = only_plan(scheduler)
    assert plan.chunks == ()
    assert len(plan.released) == 2
    assert not is_idle(scheduler)
    assert complete(scheduler, plan) == []
    assert is_idle(scheduler)


# The door and deadlines
def test_request_larger_than_every_pool_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=3)
    add(scheduler, "a", prompt_length=6, max_tokens=6)
    with pytest.raises(ContextLengthError):
        add(scheduler, "b", prompt_length=6, max_tokens=7)


def test_full_queue_is_refused() -> None:
    scheduler = make_scheduler(max_waiting=2)
    add(scheduler, "a", "b")
    with pytest.raises(OverloadedError):
        add(scheduler, "c")
    scheduler.schedule(0.0)
    add(scheduler, "c")


@pytest.mark.parametrize(("num_blocks", "error"), [(None, NotReadyError), (2, CapacityError), (5, DeadlineError)])
def test_waiting_too_long_ends_in_an_error_that_says_why(num_blocks: int | None, error: type[Exception]) -> None:
    scheduler = make_scheduler(num_blocks=5, max_queue_s=10.0, max_outage_s=10.0)
    add(scheduler, "a", "b", prompt_length=16, max_tokens=2)
    if num_blocks != 5:
        scheduler.close_pipeline(P0, 0.0)
    if num_blocks == 2:
        open_pipeline(scheduler, P0, Generation(2), 2, 1, now_s=0.0)
    scheduler.schedule(1.0)
    assert scheduler.pop_failures() == []
    scheduler.schedule(11.0)
    failures = scheduler.pop_failures()
    assert [failure.request_id for failure in failures] == (["b"] if num_blocks == 5 else ["a", "b"])
    assert {type(failure.error) for failure in failures} == {error}


def test_running_too_long_ends_in_an_error() -> None:
    scheduler = make_scheduler(max_request_s=10.0)
    add(scheduler, "a")
    plan = only_plan(scheduler)
    assert scheduler.schedule(11.0) == []
    (failure,) = scheduler.pop_failures()
    assert isinstance(failure.error, DeadlineError)
    assert complete(scheduler, plan) == []
    assert is_idle(scheduler)


def test_waiting_too_long_for_an_answer_ends_in_an_error_however_many_steps_failed_meanwhile() -> None:
    """Each failed step may have had its whole deadline: four of them were minutes without a word."""
    scheduler = make_scheduler(max_stalled_s=10.0, max_failed_steps=100)
    add(scheduler, "a", "b", max_tokens=50)
    complete(scheduler, only_plan(scheduler))
    failures: list[str] = []
    for now_s in range(1, 30):
        for plan in scheduler.schedule(float(now_s)):
            if now_s < 12:  # first nothing is answered, later it is
                scheduler.fail_step(plan.step, DeadlineError("late"), now_s + 0.5)
            else:
                complete(scheduler, plan, now_s=float(now_s))
        for failure in scheduler.pop_failures():
            assert isinstance(failure.error, DeadlineError)
            assert 10.0 < now_s <= 12.0
            failures.append(failure.request_id)
    assert sorted(failures) == ["a", "b"]


def test_a_long_answer_that_goes_on_is_never_too_long_without_one() -> None:
    scheduler = make_scheduler(max_stalled_s=10.0)
    add(scheduler, "a", prompt_length=4, max_tokens=30)
    for now_s in range(0, 270, 9):
        for plan in scheduler.schedule(float(now_s)):
            complete(scheduler, plan, now_s=float(now_s) + 8.5)
        assert scheduler.pop_failures() == []
    assert is_idle(scheduler)


def test_snapshot_tells_what_is_in_flight() -> None:
    scheduler = make_scheduler(num_blocks=10)
    add(scheduler, "a", "b", now_s=1.0)
    scheduler.schedule(2.0)
    add(scheduler, "c", now_s=2.0)
    snapshot = scheduler.snapshot()
    assert (snapshot.num_waiting, snapshot.num_running, snapshot.reserved_tokens) == (1, 2, 42)
    assert len(snapshot.pipelines) == 1
    assert (snapshot.num_free_blocks, snapshot.num_steps_in_flight) == (8, 1)
    (step,) = scheduler.steps_in_flight
    assert (step.plan.num_tokens, step.planned_s, step.sent_s) == (8, 2.0, None)


@pytest.mark.parametrize("field", ["block_tokens", "max_batch_tokens", "max_waiting", "micro_batches_per_pipeline"])
def test_setting_below_one_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        SchedulerSettings(**{field: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("ends", [Scheduler.suspend_pipeline, Scheduler.close_pipeline])
def test_time_in_line_before_an_outage_does_not_count_as_outage(
    ends: Callable[[Scheduler, PipelineId, float], None],
) -> None:
    scheduler = make_scheduler(max_batch_sequences=1, num_blocks=4, max_outage_s=30.0, max_queue_s=600.0)
    add(scheduler, "a", "b", prompt_length=12, max_tokens=4)
    only_plan(scheduler)
    assert scheduler.schedule(61.0) == []
    assert scheduler.snapshot().num_waiting == 1
    ends(scheduler, P0, 61.0)
    scheduler.schedule(61.05)
    open_pipeline(scheduler, P0, Generation(2), 4, 1, now_s=61.1)
    only_plan(scheduler, 61.1)
    assert scheduler.pop_failures() == [], "nobody was without a pipeline for long"
    ends(scheduler, P0, 100.0)
    scheduler.close_pipeline(PipelineId(7), 120.0)  # one that was not open: the outage is as old as before
    scheduler.schedule(130.0)
    assert scheduler.pop_failures() == []
    scheduler.schedule(130.1)
    assert [failure.request_id for failure in scheduler.pop_failures()] == ["a", "b"]


def test_time_in_line_has_its_end_in_an_outage_too() -> None:
    scheduler = make_scheduler(num_blocks=4, max_outage_s=30.0, max_queue_s=600.0)
    add(scheduler, "a", "b", prompt_length=12, max_tokens=4)
    only_plan(scheduler)
    scheduler.suspend_pipeline(P0, 590.0)
    scheduler.schedule(600.1)
    assert [failure.request_id for failure in scheduler.pop_failures()] == ["b"]
