"""For how long silence is explained: by what was answered, never by what failed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DeadlineError
from common.ids import Generation
from services.router.control.readiness import Awaited
from services.router.scheduling.pace import SLOW_FACTOR, UNANSWERED_S, PipelinePace, RequestPace, awaited
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.step_plan import StepPlan
from tests.support.router.scheduling import P0, add, complete, is_idle, make_scheduler, only_plan, open_pipeline

LATE = DeadlineError("pipeline 0 did not answer a step in time")


def token_of(scheduler: Scheduler) -> Awaited | None:
    return scheduler.snapshot().pipelines[0].token


def fail(scheduler: Scheduler, plan: StepPlan, now_s: float) -> None:
    """By its deadline; the pipeline gets a new generation with its caches as they were."""
    scheduler.fail_step(plan.step, LATE, now_s)
    scheduler.suspend_pipeline(P0, now_s)
    open_pipeline(scheduler, P0, Generation(plan.generation + 1), 100, 1, now_s, kv_marks=(10**6,))


def decode(scheduler: Scheduler, num_steps: int, step_s: float, now_s: float = 0.0) -> float:
    for _ in range(num_steps):
        plan = only_plan(scheduler, now_s)
        now_s += step_s
        complete(scheduler, plan, now_s=now_s)
    return now_s


def is_silence_explained(scheduler: Scheduler, now_s: float) -> bool:
    waits = token_of(scheduler)
    return waits is None or not waits.is_overdue(now_s, now_s)


def test_steps_that_failed_by_their_deadline_are_no_measure_of_how_long_steps_take() -> None:
    scheduler = make_scheduler(max_failed_steps=9)
    add(scheduler, "a", max_tokens=300)
    now_s = decode(scheduler, 120, 0.05)
    for _ in range(3):
        plan = only_plan(scheduler, now_s)
        now_s += 60.0
        fail(scheduler, plan, now_s)
    now_s = decode(scheduler, 3, 0.05, now_s)
    assert scheduler._schedules.all[P0].pace.p99_s == pytest.approx(0.05)
    only_plan(scheduler, now_s)
    (pipeline,) = scheduler.snapshot().pipelines
    assert pipeline.step is not None
    assert pipeline.step.explained_s == UNANSWERED_S
    assert not is_silence_explained(scheduler, now_s + 2.0)


def test_a_request_whose_steps_fail_and_are_sent_again_goes_on_waiting_for_the_same_token() -> None:
    scheduler = make_scheduler(max_failed_steps=9)
    add(scheduler, "a", max_tokens=300)
    now_s = stuck_since_s = decode(scheduler, 20, 0.05)
    for _ in range(3):  # the third time all is computed again from the prompt
        plan = only_plan(scheduler, now_s)
        assert is_silence_explained(scheduler, now_s) == (now_s == stuck_since_s), "nothing has come since then"
        now_s += 20.0
        fail(scheduler, plan, now_s)
    decode(scheduler, 1, 0.05, now_s)
    assert is_silence_explained(scheduler, now_s + 0.1), "a token has"


def test_a_slow_pipeline_explains_four_times_its_usual_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", max_tokens=300)
    now_s = decode(scheduler, 20, 2.0)
    only_plan(scheduler, now_s)
    assert is_silence_explained(scheduler, now_s + 7.9)
    assert not is_silence_explained(scheduler, now_s + 8.1)


def test_one_long_stall_that_ended_well_does_not_explain_the_next() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", max_tokens=300)
    now_s = decode(scheduler, 20, 0.05)
    now_s = decode(scheduler, 1, 30.0, now_s)
    now_s = decode(scheduler, 2, 0.05, now_s)
    only_plan(scheduler, now_s)
    assert not is_silence_explained(scheduler, now_s + 2.0)


def test_a_request_in_line_for_its_first_step_is_not_stuck_while_others_get_on() -> None:
    scheduler = make_scheduler(max_batch_tokens=4, prefill_chunk_tokens=4, micro_batches_per_pipeline=1)
    add(scheduler, *"abcdef", prompt_length=40, max_tokens=2)
    now_s = 0.0
    while not is_idle(scheduler):
        now_s = decode(scheduler, 1, 1.0, now_s)
        assert is_silence_explained(scheduler, now_s)
    assert now_s > 40, "the last one waited for its turn for that long"


def test_a_replay_is_getting_further() -> None:
    scheduler = make_scheduler(max_batch_tokens=4, prefill_chunk_tokens=4, micro_batches_per_pipeline=1)
    add(scheduler, "a", prompt_length=40, max_tokens=20)
    now_s = decode(scheduler, 12, 0.05)
    scheduler.suspend_pipeline(P0, now_s)
    open_pipeline(scheduler, P0, Generation(2), 100, 1, now_s, kv_marks=(0,))
    for _ in range(10):
        plan = only_plan(scheduler, now_s)
        assert plan.computing_slots == (0,)
        now_s += 1.0
        complete(scheduler, plan, now_s=now_s)
        assert is_silence_explained(scheduler, now_s)


def test_before_anything_is_measured_nothing_is_known_of_the_pace() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a")
    only_plan(scheduler)
    assert token_of(scheduler) == Awaited(0.0, UNANSWERED_S, is_measured=False)


def test_a_step_of_a_size_that_was_never_seen_may_take_as_many_times_as_long_as_it_is_larger() -> None:
    pace = PipelinePace()
    assert pace.usual_s(512) is None
    for seconds in (0.1, 0.1, 5.0):
        pace.measured(16, 0.0, seconds)
    assert pace.usual_s(20) == 0.1
    assert pace.usual_s(512) == pytest.approx(3.2)
    assert pace.usual_s(1) == 0.1
    pace.measured(512, 0.0, 0.8)
    assert pace.usual_s(512) == 0.8


def test_a_gap_in_which_a_step_failed_is_no_measure() -> None:
    pace = RequestPace(0.0)
    pace.progressed(1.0, is_measure=True)
    pace.is_disturbed = True
    pace.progressed(61.0, is_measure=True)
    pace.progressed(100.0, is_measure=False)
    assert list(pace.gaps_s) == [1.0]


@given(st.lists(st.tuples(st.floats(0.001, 3.0), st.booleans()), min_size=1, max_size=40))
def test_failures_never_make_silence_longer_explained(steps: list[tuple[float, bool]]) -> None:
    """With the same answers and any failures between them, what explains silence is that of the answers alone."""
    scheduler = make_scheduler(max_failed_steps=99)
    add(scheduler, "a", max_tokens=300)
    now_s, answers = 0.0, [seconds for seconds, is_answered in steps if is_answered]
    for seconds, is_answered in steps:
        plan = only_plan(scheduler, now_s)
        if is_answered:
            now_s += seconds
            complete(scheduler, plan, now_s=now_s)
        else:
            now_s += 60.0
            fail(scheduler, plan, now_s)
    only_plan(scheduler, now_s)
    waits = token_of(scheduler)
    assert waits is not None
    assert waits.explained_s <= max(UNANSWERED_S, SLOW_FACTOR * 8 * max(answers, default=0.0)), "8: prompt to token"


def test_the_slowest_of_what_is_known_explains() -> None:
    assert awaited(1.0, 0.0, None) == Awaited(1.0, UNANSWERED_S, is_measured=False)
    assert awaited(1.0, 0.5, 2.0) == Awaited(1.0, 8.0, is_measured=True)
