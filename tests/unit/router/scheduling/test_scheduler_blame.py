"""An error while one request is handled costs that request: wherever it is raised, the others get their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ExecutionError
from common.ids import Generation, PipelineId, RequestId, SequenceId
from services.router.scheduling.blocks.sharing import PrefixSharing
from services.router.scheduling.pipeline_schedule import PipelineSchedule
from services.router.scheduling.request import Blame, Request
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from services.router.scheduling.step_plan import ComputedBy, RequestFailure, StepPlan
from tests.support.router.scheduling import add, complete, is_idle, make_scheduler, names_in, only_plan, open_pipeline
from tests.support.router.simulated_pipeline import SimulatedPipeline, build_request, reference_tokens

P0 = PipelineId(0)
CULPRIT = RequestId("culprit")
PLACES: list[tuple[type, str]] = [
    (Request, "start"),
    (Request, "requeue"),
    (Request, "token_ids"),
    (Request, "note_computed"),
    (Request, "note_replayed"),
    (Request, "accept_token"),
    (Request, "covered_by"),
    (PipelineSchedule, "admit"),
    (PipelineSchedule, "can_ever_hold"),
    (PipelineSchedule, "adopt"),
    (PipelineSchedule, "withdraw"),
    (PipelineSchedule, "_plan_chunk"),
    (PipelineSchedule, "_chunk"),
    (PipelineSchedule, "_give_back"),
    (PrefixSharing, "take"),
    (PrefixSharing, "skip_replayed"),
    (PrefixSharing, "num_to_replay"),
]
PLACES_OF_TIER: list[tuple[type, str]] = [
    (PrefixSharing, "find_kept"),
    (PrefixSharing, "begin_restoring"),
    (PrefixSharing, "note_restored"),
    (PipelineSchedule, "_plan_restoring"),
]


@contextmanager
def breaking(place: tuple[type, str], call: int, is_after: bool) -> Iterator[None]:
    """The named method raises for the culprit from its `call`-th call on, before or after it has done its work."""
    owner, name = place
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def broken(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if CULPRIT not in (each.request_id for each in arguments if isinstance(each, Request)):
            return original(*arguments, **named)
        calls += 1
        if calls >= call and not is_after:
            raise OverflowError("simulated")
        result = original(*arguments, **named)
        if calls >= call:
            raise OverflowError("simulated")
        return result

    with mock.patch.object(owner, name, broken):
        yield


class Mesh:
    """A scheduler over two stages, in a pool in which requests are preempted."""

    def __init__(self, term: int = 1, num_tier_slots: int = 0) -> None:
        self.num_tier_slots = num_tier_slots
        self.settings = SchedulerSettings(
            block_tokens=2, max_batch_tokens=16, prefill_chunk_tokens=6, caches_prefixes=num_tier_slots > 0
        )
        self.scheduler = Scheduler(self.settings, first_number=term << 32)
        self.generation = term << 32
        self.tokens: dict[RequestId, list[int]] = {}
        self.failures: list[RequestFailure] = []
        self.placed: dict[RequestId, SequenceId] = {}
        self.in_flight: list[StepPlan] = []
        self.stages = SimulatedPipeline(P0, Generation(self.generation), 14, 2)

    def open(self, **arguments: Any) -> None:
        self.generation += 1
        self.in_flight.clear()
        self.stages.resume(Generation(self.generation), (), mirrored=False)
        arguments |= {"num_tier_slots": self.num_tier_slots, "tier_since": self.stages.tier_since}
        open_pipeline(self.scheduler, P0, Generation(self.generation), 14, 2, 0.0, self.stages.marks, **arguments)
        self.scheduler.check_invariants()

    def turn(self) -> bool:
        """One round; whether there is more to do."""
        plans = self.scheduler.schedule(0.0)
        self.failures += self.scheduler.pop_failures()
        self.scheduler.check_invariants()
        if self.scheduler.pop_renewals():
            self.open()
            return True
        self.placed.update(self.scheduler.pop_placements())
        for plan in plans:
            self.stages.send(plan)
        self.in_flight += plans
        if self.in_flight:
            plan = self.in_flight.pop(0)
            sampled = self.stages.answer(plan)
            for output in self.scheduler.complete(plan.step, sampled, 0.0, computed_by=ComputedBy(7)):
                self.tokens.setdefault(output.request_id, []).append(output.token.token_id)
            self.scheduler.check_invariants()
            return True
        return bool(plans)

    def evict(self) -> None:
        """What the culprit needs was computed for another, had to make room, and is in the tier."""
        for request in (replace(REQUESTS[2], request_id=RequestId("before")), build_request("all", 26, 2, seed=9)):
            self.scheduler.add(request, 0.0)
            while self.turn():
                pass


REQUESTS = [
    build_request(name, prompt_length, max_tokens, seed=seed)
    for seed, (name, prompt_length, max_tokens) in enumerate(
        [("a", 12, 4), ("b", 2, 9), (CULPRIT, 3, 9), ("d", 1, 9), ("e", 5, 3)]
    )
]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    place=st.sampled_from([*PLACES, *PLACES_OF_TIER]),
    num_tier_slots=st.sampled_from([0, 8]),
    call=st.integers(1, 6),
    is_after=st.booleans(),
    suspended_at=st.integers(0, 12),
    restarted_at=st.integers(0, 12),
    closed_at=st.integers(0, 12),
)
def test_an_error_anywhere_costs_the_request_that_it_is_about_and_nobody_else_a_token(
    place: tuple[type, str],
    num_tier_slots: int,
    call: int,
    is_after: bool,
    suspended_at: int,
    restarted_at: int,
    closed_at: int,
) -> None:
    mesh = Mesh(num_tier_slots=num_tier_slots)
    with breaking(place, call, is_after):
        mesh.open()
        if num_tier_slots:
            mesh.evict()
        for request in REQUESTS:
            mesh.scheduler.add(request, 0.0)
        for number in range(400):
            if number == suspended_at:
                mesh.scheduler.suspend_pipeline(P0, 0.0)
                mesh.open()
            if number == closed_at:
                mesh.scheduler.close_pipeline(P0, 0.0)
                mesh.open()
            if number == restarted_at:
                mesh = restarted(mesh)
            if not mesh.turn() and number > max(suspended_at, restarted_at, closed_at):
                break
        mesh.failures += mesh.scheduler.pop_failures()
    assert is_idle(mesh.scheduler)
    assert mesh.scheduler.snapshot().reserved_tokens == 0
    for request in REQUESTS:
        if request.request_id != CULPRIT:
            assert mesh.tokens[request.request_id] == reference_tokens(request)
    assert {failure.request_id for failure in mesh.failures} <= {CULPRIT}
    if mesh.failures:
        (failure,) = mesh.failures
        assert isinstance(failure.error, ExecutionError)
        assert "culprit" in failure.error.message
        assert "OverflowError" in failure.error.message
    else:
        assert mesh.tokens[CULPRIT] == reference_tokens(REQUESTS[2])


def restarted(mesh: Mesh) -> Mesh:
    """Another router over the same stages, with what a journal would have."""
    after = Mesh(2, mesh.num_tier_slots)
    after.tokens, after.stages, after.placed, after.failures = mesh.tokens, mesh.stages, mesh.placed, mesh.failures
    failed = {failure.request_id for failure in mesh.failures}
    for request in REQUESTS:
        tokens = mesh.tokens.get(request.request_id, [])
        if request.request_id not in failed and len(tokens) < request.sampling.max_tokens:
            after.scheduler.add(request.restored(tokens, mesh.placed.get(request.request_id)), 0.0)
    after.open(held=mesh.stages.held())
    return after


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("place", PLACES_OF_TIER, ids=lambda place: place[1])
def test_an_error_over_what_comes_back_ends_who_needs_it_and_not_what_the_pipeline_has_in_flight(
    place: tuple[type, str], is_after: bool
) -> None:
    mesh = Mesh(num_tier_slots=8)
    mesh.open()
    mesh.evict()
    opened = mesh.generation
    with breaking(place, 1, is_after):
        for request in REQUESTS:
            mesh.scheduler.add(request, 0.0)
        while mesh.turn():
            pass
    assert [failure.request_id for failure in mesh.failures] == [CULPRIT]
    assert mesh.generation == opened


def test_an_error_that_is_nobodys_in_particular_ends_who_runs_there_after_a_few_tries_and_not_the_mesh() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a")
    with mock.patch.object(PipelineSchedule, "_candidates", side_effect=KeyError("simulated")):
        for generation in range(2, 6):
            assert scheduler.schedule(0.0) == []
            assert scheduler.pop_renewals() == [P0]
            scheduler.check_invariants()
            open_pipeline(scheduler, P0, Generation(generation), 100, 1, 0.0)
    (failure,) = scheduler.pop_failures()
    assert failure.request_id == "a"
    add(scheduler, "b")
    assert names_in(only_plan(scheduler)) == ["b"]


@pytest.mark.parametrize(("names", "unfit"), [(("a", CULPRIT), 3), ((CULPRIT, "a"), 7)])
def test_one_with_a_token_that_has_no_part_in_a_key_ends_alone_whoever_follows_whom(
    names: tuple[str, str], unfit: int
) -> None:
    scheduler = make_scheduler(num_slots=2, caches_prefixes=True, prefill_chunk_tokens=4)
    for name in names:
        prompt = [2**31 if name == CULPRIT and position == unfit else position for position in range(12)]
        scheduler.add(replace(build_request(name, 1, 4), prompt_token_ids=tuple(prompt)), 0.0)
    plan = scheduler.schedule(0.0)[0]
    scheduler.complete(plan.step, {}, 0.0, computed_by=ComputedBy(7))
    scheduler.schedule(0.0)
    assert [failure.request_id for failure in scheduler.pop_failures()] == [CULPRIT]
    assert scheduler.pop_renewals() == []
    (left,) = scheduler._schedules.all[P0].running
    assert left.num_computed_tokens == 4


def test_a_step_that_fits_no_message_costs_the_request_that_does_not_fit() -> None:
    scheduler = make_scheduler(micro_batches_per_pipeline=1)
    add(scheduler, "a", "b", "c")
    plan = only_plan(scheduler)
    culprit = plan.chunks[1].sequence_id
    scheduler.fail_step(plan.step, ExecutionError("no"), 0.0, {culprit: OverflowError("too large")})
    (failure,) = scheduler.pop_failures()
    assert failure.request_id == "b"
    seen = set()
    for _ in range(3):
        plan = only_plan(scheduler)
        seen.update(names_in(plan))
        complete(scheduler, plan)
    assert seen == {"a", "c"}


def test_who_is_handled_is_told_before_and_after_and_stays_told_where_the_process_ends() -> None:
    told: list[str] = []
    scheduler = Scheduler(SchedulerSettings(block_tokens=4), attend=told.append)
    open_pipeline(scheduler, P0, Generation(1), 100, 2, now_s=0.0)
    add(scheduler, "a")
    scheduler.schedule(0.0)
    assert "a" in told
    assert told[-1] == ""
    with mock.patch.object(Request, "token_ids", side_effect=SystemExit):
        add(scheduler, "b")
        with pytest.raises(SystemExit):
            scheduler.schedule(0.0)
    assert told[-1] == "b"


def test_one_who_is_handled_for_another_is_to_blame_for_what_is_raised_meanwhile() -> None:
    blame = Blame()
    a, b = (Request(build_request(name, 1, 1), 1, 0.0) for name in "ab")
    with blame.handling(a):
        with blame.handling(b):
            raise KeyError("b")
        assert blame.has(b)
        assert not blame.has(a)
    assert [request.request_id for request, _ in blame.pop_broken()] == ["b"]
    assert not blame.pop_broken()
