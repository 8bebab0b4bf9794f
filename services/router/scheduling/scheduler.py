"""Requests from arrival to last token, over all pipelines; `pipeline_schedule.py` picks which are in a step.

Pure; time is an argument. The owner adds and cancels requests, opens and closes pipelines, sends what `schedule`
returns, and feeds the answers back through `complete` and `fail_step`. First come, first served; a recomputed request
keeps its place and its tokens. Tokens come out of `complete` once each, in order, however often it is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from types import MappingProxyType

from common.errors import ExecutionError, InvalidRequestError, MoemeshError
from common.ids import PipelineId, RequestId, SequenceId, StepId
from services.router.control.actions import OpenPipeline
from services.router.engine import GenerationRequest, Token
from services.router.scheduling.admission import Admission, CompletionRate, lateness
from services.router.scheduling.drafts.drafting import Drafter
from services.router.scheduling.pipeline_schedule import StepInFlight
from services.router.scheduling.pipeline_schedules import PipelineSchedules
from services.router.scheduling.pipeline_selection import PipelineSelection
from services.router.scheduling.request import Attend, Blame, Request, RequestState
from services.router.scheduling.settings import SchedulerSettings
from services.router.scheduling.snapshot import SchedulerCounters, SchedulerSnapshot, pipeline_evidence
from services.router.scheduling.step_plan import (
    UNKNOWN,
    ComputedBy,
    RequestFailure,
    ScheduledChunk,
    StepPlan,
    TokenOutput,
)
from services.router.scheduling.waiting_line import WaitingLine


class Scheduler:
    """See the module. Numbers of steps and sequences count up from `first_number`: they ascend over routers' terms."""

    def __init__(
        self,
        settings: SchedulerSettings,
        first_number: int = 0,
        attend: Attend = lambda name: None,
        drafter: Drafter | None = None,
    ) -> None:
        """`attend` is told which request is being handled, before anything is done for it. Without `drafter` no tokens
        are guessed."""
        self.settings = settings
        self.counters = SchedulerCounters()
        self._admission = Admission(settings)
        self._selection = PipelineSelection(settings.pipeline_policy)
        self._completion_rate = CompletionRate()
        self._requests: dict[RequestId, Request] = {}
        self._blame = Blame(attend)
        self._schedules = PipelineSchedules(settings, self._blame, self.counters.prefixes, drafter)
        self._drafter = drafter
        self._waiting = WaitingLine(self._schedules, self._selection, self._blame, self.counters, first_number)
        self._failures: list[RequestFailure] = []
        self._renewals: list[PipelineId] = []
        self._last_step = StepId(first_number)

    # Requests

    def add(self, request: GenerationRequest, now_s: float) -> None:
        """Puts a request in line. Raises InvalidRequestError, ContextLengthError, OverloadedError, and keeps nothing.

        One that is restored goes behind those restored before it, and on after its tokens so far (fewer than it may
        have, none of them its last). Nothing refuses it but an InvalidRequestError, if it has no token left to make.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use")
        if request.is_restored:
            if len(request.generated_token_ids) >= request.sampling.max_tokens:
                raise InvalidRequestError(f"request {request.request_id} was finished")
            arrival = self._admission.readmit(request)
        else:
            arrival = self._admission.admit(
                request,
                num_waiting=self._waiting.num_ahead(request, self.settings.max_waiting),
                largest_pool_blocks=max(self._schedules.pool_sizes, default=None),
                completions_per_s=self._completion_rate.per_s(now_s),
            )
        admitted = Request(request, arrival, now_s, block_tokens=self.settings.block_tokens)
        self._requests[request.request_id] = admitted
        self._waiting.insert(admitted)

    def cancel(self, request_id: RequestId) -> bool:
        """Ends a request that is not wanted any longer. Returns False if it is not here: it may have ended."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        with self._blame.handling(request):
            self._withdraw(request)
            request.end(RequestState.CANCELLED)
            self._forget(request)
        self.counters.requests_cancelled += 1
        return True

    # Pipelines

    def open_pipeline(self, opening: OpenPipeline, now_s: float) -> None:
        """Opens a pipeline whose slots are ready. A suspended one of the same size keeps its blocks, as far as the
        marks say. An older generation of it that is open is closed first. Raises ValueError if that is not older."""
        pipeline, generation = opening.pipeline, opening.generation
        current = self._schedules.all.get(pipeline)
        if current is not None:
            is_open, size = current.suspended_s is None, (current.allocator.num_blocks, current.num_slots)
            if is_open and current.generation >= generation:
                raise ValueError(
                    f"pipeline {pipeline} is open in generation {current.generation}, not before {generation}"
                )
            if is_open or size != (opening.num_blocks, opening.num_slots):
                self.close_pipeline(pipeline, now_s)
        schedule = self._schedules.begin(opening)
        kv_marks: Sequence[int] = opening.kv_marks
        if (held := opening.held) is not None:
            adopted_step = self._draw_step()
            adopted = schedule.adopt(held, self._waiting.requests, adopted_step, now_s)
            # A holder that reported it and has it still has what was adopted, others nothing.
            kv_marks = [adopted_step if held.is_held_by(slot, mark) else 0 for slot, mark in enumerate(kv_marks)]
            self._waiting.requests[:] = [request for request in self._waiting.requests if request not in adopted]
            self.counters.requests_adopted += len(adopted)
        schedule.resume(opening, kv_marks, now_s)
        self._selection.note_opening(pipeline, now_s)
        self._end_broken(now_s)

    def suspend_pipeline(self, pipeline: PipelineId, now_s: float) -> None:
        """Suspends one that lost a slot. What ran there keeps its blocks and waits; its steps in flight are dropped."""
        self._schedules.suspend(pipeline, now_s)
        self._end_broken(now_s)

    def close_pipeline(self, pipeline: PipelineId, now_s: float) -> None:
        """Closes one that is gone. What ran there waits again, each at its place; steps in flight there are dropped."""
        for request in self._schedules.close(pipeline, now_s):
            self._waiting.requeue(request, now_s)
        self._end_broken(now_s)

    # Steps

    def schedule(
        self,
        now_s: float,
        is_awaited: Callable[[SequenceId], bool] = lambda sequence_id: False,
        *,
        expires: bool = True,
    ) -> list[StepPlan]:
        """Plans all micro-batches that may be sent now. Ask `pop_failures` afterwards: deadlines are looked at here.

        `is_awaited`: whether a restored request, by the sequence that it was, is to wait for the pipeline that has its
        cache. `expires`: whether requests end whose time is up.
        """
        if expires:
            self._expire(now_s)
        self._waiting.place(now_s, is_awaited)
        plans: list[StepPlan] = []
        for pipeline in sorted(self._schedules.open):
            try:
                plans += self._plan_steps(pipeline, now_s)
            except Exception as error:  # no request's in particular, but the mesh has more than this pipeline
                self._charge_all(pipeline, error)
                self._start_over(pipeline, now_s)
        self._end_broken(now_s)
        return [plan for plan in plans if plan.pipeline in self._schedules.open]

    def _plan_steps(self, pipeline: PipelineId, now_s: float) -> list[StepPlan]:
        plans: list[StepPlan] = []
        while True:
            plan, preempted = self._schedules.all[pipeline].plan_step(
                StepId(self._last_step + 1), now_s, may_plan_ahead=not self._waiting.requests
            )
            for request in preempted:
                self.counters.preemptions += 1
                self._waiting.requeue(request, now_s)
            if plan is None:
                return plans
            self._last_step = plan.step
            self.counters.steps_planned += 1
            self.counters.steps_planned_ahead += plan.awaited_step > 0
            self.counters.steps_with_drafts += plan.num_drafts > 0
            self.counters.drafts_planned += plan.num_drafts
            self.counters.tokens_planned += plan.num_tokens
            plans.append(plan)

    def plan_canaries(self, now_s: float) -> list[StepPlan]:
        """Plans steps that carry nothing, for open pipelines in which nothing moves: not counted as steps planned."""
        plans: list[StepPlan] = []
        for pipeline in sorted(self._schedules.open):
            schedule = self._schedules.all[pipeline]
            if schedule.is_canary_due(now_s):
                plans.append(schedule.plan_canary(self._draw_step(), now_s))
        return plans

    def complete(
        self,
        step: StepId,
        sampled: Mapping[SequenceId, Sequence[Token]],
        now_s: float,
        retried_calls: int = 0,
        computed_by: ComputedBy = UNKNOWN,
    ) -> list[TokenOutput]:
        """Applies an answer: of each sequence the drafts that were right, and the token after them. Returns what to
        journal and deliver, by arrival. That of a step that is not in flight changes nothing.

        A sequence that is missing from `sampled` counts as a failed step for its request alone.
        """
        in_flight = self._schedules.land(step, now_s)
        if in_flight is None:
            return []
        outputs: list[TokenOutput] = []
        schedule, is_replay = self._schedules.all[in_flight.plan.pipeline], bool(in_flight.plan.computing_slots)
        schedule.prefixes.note_answered(computed_by)
        for chunk, request in zip(in_flight.plan.chunks, in_flight.requests, strict=True):
            if request.state is not RequestState.RUNNING or self._blame.has(request):
                continue
            if not is_replay and schedule.prefixes.is_misled(request, computed_by):
                self._start_misled_over(request, now_s)
                continue
            if chunk.start_position > request.num_computed_tokens and not in_flight.plan.computing_slots:
                continue  # planned ahead, and the step before brought no token of it: that is done again
            with self._blame.handling(request):
                request.num_retried_calls += retried_calls
                tokens = sampled.get(chunk.sequence_id, ()) if chunk.samples else ()
                if chunk.samples and not tokens:
                    error = ExecutionError(
                        f"pipeline {request.pipeline} answered step {step} without a token for {request.request_id}"
                    )
                    self._retry(request, error, now_s)
                    continue
                tokens = self._note_tokens(request, chunk, tokens)
                # Drafts that were right are known before their positions count: blocks are named by their tokens.
                outputs += [self._accept_token(request, token, now_s) for token in tokens[:-1]]
                num_rejected = chunk.num_sampling_rows - len(tokens)
                schedule.note_computed(
                    request, chunk, step, computed_by, now_s, is_replay=is_replay, num_rejected=num_rejected
                )
                self.counters.tokens_replayed += len(chunk.token_ids) * is_replay
                outputs += [self._accept_token(request, token, now_s) for token in tokens[-1:]]
        self._end_broken(now_s)
        return outputs

    def _note_tokens(self, request: Request, chunk: ScheduledChunk, tokens: Sequence[Token]) -> Sequence[Token]:
        """Returns the tokens of a chunk with what is to be told of its drafts."""
        if chunk.num_drafts:
            *right, last = tokens
            num_rejected = chunk.num_drafts - len(right)
            self.counters.drafts_accepted += len(right)
            self.counters.drafts_rejected += num_rejected
            tokens = [
                *(replace(token, is_draft=True) for token in right),
                replace(last, num_rejected_drafts=num_rejected),
            ]
        if self._drafter is not None and tokens:
            num_before, token_ids = len(request.generated_token_ids), [token.token_id for token in tokens]
            self._drafter.note_tokens(request.request_id, num_before, token_ids)
        return tokens

    def _start_misled_over(self, request: Request, now_s: float) -> None:
        """Computes it from the beginning, without what it has found, once the last of its steps is back."""
        with self._blame.handling(request):
            request.distrust_found()
            if not request.steps:
                self._withdraw(request)
                self._waiting.requeue(request, now_s)

    def _accept_token(self, request: Request, sampled: Token, now_s: float) -> TokenOutput:
        output = TokenOutput(request.request_id, request.accept_token(sampled))
        self.counters.tokens_generated += 1
        if output.token.finish_reason is not None:
            self._withdraw(request)
            self._forget(request)
            self._completion_rate.note(now_s)
            self.counters.requests_finished += 1
        return output

    def fail_step(
        self,
        step: StepId,
        error: MoemeshError,
        now_s: float,
        culprits: Mapping[SequenceId, Exception] = MappingProxyType({}),
    ) -> None:
        """Ends a step that could not be done. Its requests are recomputed, or end if they have failed too often. The
        other steps of its pipeline become void, as with the new generation that it needs, and are done again.

        `culprits`: sequences that are known to have made it fail, with what they raised; their requests end here.
        """
        in_flight = self._schedules.land(step, now_s, has_failed=True)
        if in_flight is None:
            return
        self.counters.failed_steps += 1
        schedule = self._schedules.all[in_flight.plan.pipeline]
        schedule.void_steps()
        # Not every stage may have been told; one that has does nothing the second time.
        schedule.held_releases.extend(in_flight.plan.released)
        for request in in_flight.requests:
            if request.state is RequestState.RUNNING and not self._blame.has(request):
                with self._blame.handling(request):
                    if request.sequence_id is not None and request.sequence_id in culprits:
                        raise culprits[request.sequence_id]
                    self._retry(request, error, now_s)
        self._end_broken(now_s)

    def pop_failures(self) -> list[RequestFailure]:
        """Returns the requests that failed since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def pop_renewals(self) -> list[PipelineId]:
        """Returns pipelines that were given up since the last call, since their blocks did not add up: what ran there
        waits again. Each needs a new generation; its steps in flight are void."""
        renewals, self._renewals = self._renewals, []
        return renewals

    def pop_draft_errors(self) -> list[tuple[PipelineId, Exception]]:
        """Returns pipelines that draft no more, since the last call: with what their drafter raised. They draft again
        when they have been closed and open again."""
        errors = [(pipeline, schedule.drafts.pop_error()) for pipeline, schedule in self._schedules.all.items()]
        return [(pipeline, error) for pipeline, error in errors if error is not None]

    def pop_placements(self) -> list[tuple[RequestId, SequenceId]]:
        """Returns under which numbers requests run that were placed since the last call: stages know them by these."""
        return self._waiting.pop_placements()

    # Being observed

    @property
    def steps_in_flight(self) -> list[StepInFlight]:
        """Returns steps that were planned and are not answered, in the order in which they were planned."""
        return self._schedules.steps_in_flight

    def step(self, number: StepId) -> StepInFlight | None:
        """Returns the step of this number; None if it is not in flight any more, or never was."""
        return self._schedules.step(number)

    def completions_per_s(self, now_s: float) -> float:
        """Returns how fast the line goes forward."""
        return self._completion_rate.per_s(now_s)

    def snapshot(self) -> SchedulerSnapshot:
        """Returns a copy of what metrics and the status page show."""
        schedules = self._schedules.open
        caches = [schedule.allocator.cache for schedule in schedules.values()]
        return SchedulerSnapshot(
            num_waiting=len(self._waiting.requests),
            num_ahead=self._waiting.num_ahead(None, self.settings.max_waiting),
            num_running=sum(len(schedule.running) for schedule in self._schedules.all.values()),
            reserved_tokens=self._admission.reserved_tokens,
            pipelines=tuple(pipeline_evidence(schedules[pipeline]) for pipeline in sorted(schedules)),
            counters=deepcopy(self.counters),
            num_free_blocks=sum(schedule.allocator.num_free for schedule in schedules.values()),
            num_cached_blocks=sum(cache.num_blocks for cache in caches),
            num_tier_slots=sum(cache.tier.num_slots for cache in caches),
            num_kept_blocks=sum(cache.tier.num_kept for cache in caches),
            num_steps_in_flight=sum(not step.is_canary for step in self.steps_in_flight),
        )

    def check_invariants(self) -> None:
        """Raises AssertionError if a request is lost or in two places, or blocks or reserved tokens do not add up."""
        waiting = self._waiting.requests
        placed = list(waiting)
        for schedule in self._schedules.all.values():
            schedule.check_invariants()
            placed += schedule.running
        assert len(placed) == len({id(request) for request in placed}), "a request is in two places"
        assert {id(request) for request in placed} == set(map(id, self._requests.values())), "a request is lost"
        for request in waiting:
            assert request.state is RequestState.WAITING, f"{request.request_id} is {request.state} and waits"
            assert not request.block_table, f"{request.request_id} waits and holds blocks"
            assert not request.steps, f"{request.request_id} waits and is in flight"
        arrivals = [request.arrival for request in waiting]
        assert arrivals == sorted(arrivals), "the line is out of order"
        num_reserved = sum(request.generation_request.max_num_tokens for request in placed)
        assert self._admission.reserved_tokens == num_reserved, "reserved tokens do not add up"

    # Inside

    def _draw_step(self) -> StepId:
        self._last_step = StepId(self._last_step + 1)
        return self._last_step

    def _expire(self, now_s: float) -> None:
        """Ends the requests that have waited or lived for too long."""
        none_open_since_s = self._schedules.none_open_since_s
        for request in list(self._requests.values()):
            if is_late(request, self.settings, now_s, none_open_since_s, self._schedules.suspended_since_s(request)):
                with self._blame.handling(request):
                    age_s, pools = now_s - request.arrived_s, self._schedules.pool_sizes
                    error = lateness(request.generation_request, age_s, pools, self.settings.block_tokens)
                    self._fail(request, error)

    def _retry(self, request: Request, error: MoemeshError, now_s: float) -> None:
        """Does the step again; at the next failure recomputes the request; fails it once it has had its share."""
        request.num_failed_steps += 1
        if request.num_failed_steps > self.settings.max_failed_steps:
            self._fail(request, error)
        elif request.num_failed_steps == 1:
            request.tell_anew()
        else:
            self._withdraw(request)
            self._waiting.requeue(request, now_s)

    def _fail(self, request: Request, error: MoemeshError) -> None:
        self._withdraw(request)
        request.end(RequestState.FAILED)
        self._forget(request)
        self.counters.requests_failed += 1
        self._failures.append(RequestFailure(request.request_id, error))

    def _withdraw(self, request: Request) -> None:
        """Takes it out of the line or off its pipeline."""
        if request.state is RequestState.WAITING:
            self._waiting.requests.remove(request)
        elif request.pipeline is not None:
            self._schedules.all[request.pipeline].withdraw(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        self._admission.release(request.generation_request)
        if self._drafter is not None:
            self._drafter.forget(request.request_id)

    # After an error of our own

    def _end_broken(self, now_s: float) -> None:
        """Ends the requests whose handling raised, and with them nothing else. A pipeline whose blocks do not add up
        after that starts over: what ran there is computed again. Nothing of what is there is trusted here."""
        broken = self._blame.pop_broken()
        if not broken:
            return
        failures = [self._end_one(request, cause) for request, cause in broken]
        for schedule in list(self._schedules.all.values()):
            try:
                schedule.check_invariants()
            except Exception:  # whatever was left half done
                self._start_over(schedule.pipeline, now_s)
        self._waiting.requests[:] = sorted(
            (request for request in self._requests.values() if request.state is RequestState.WAITING),
            key=lambda request: request.arrival,
        )
        self._admission.recount(request.generation_request for request in self._requests.values())
        self._failures += [failure for failure in failures if failure is not None]

    def _end_one(self, request: Request, cause: Exception) -> RequestFailure | None:
        """Ends one that may be half in one place and half in another: what is left of it is looked for, not assumed."""
        for schedule in self._schedules.all.values():
            if request in schedule.running:
                try:
                    schedule.withdraw(request)
                except Exception:  # the pipeline's own check sees what it still holds
                    schedule.running = [other for other in schedule.running if other is not request]
        if self._drafter is not None:
            with suppress(Exception):  # it may be what raised
                self._drafter.forget(request.request_id)
        if self._requests.pop(request.request_id, None) is None and request.state is not RequestState.FINISHED:
            return None  # its client was gone
        request.state = RequestState.FAILED
        self.counters.requests_failed += 1
        error = ExecutionError(
            f"the router failed while it handled request {request.request_id} ({type(cause).__name__}: {cause}); "
            "other requests go on"
        )
        return RequestFailure(request.request_id, error, cause)

    def _charge_all(self, pipeline: PipelineId, cause: Exception) -> None:
        """Takes one try from each that runs there, so that it ends: planning raised, and not over one request."""
        for request in self._schedules.all[pipeline].running:
            request.num_failed_steps += 1
            if request.num_failed_steps > self.settings.max_failed_steps:
                with self._blame.handling(request):
                    raise cause

    def _start_over(self, pipeline: PipelineId, now_s: float) -> None:
        """Gives up the pipeline's blocks and steps: what ran there is computed again."""
        requests = [request for request in self._requests.values() if request.pipeline == pipeline]
        sequence_ids = [request.sequence_id for request in requests if request.sequence_id is not None]
        self._schedules.discard(pipeline, sequence_ids, now_s)
        self._renewals.append(pipeline)
        for request in requests:
            self.counters.tokens_recomputed += request.num_computed_tokens
            request.num_recoveries += 1
            request.start_over(now_s)
            self._waiting.insert(request)


def is_late(
    request: Request,
    settings: SchedulerSettings,
    now_s: float,
    none_open_since_s: float | None,
    suspended_since_s: float | None,
) -> bool:
    """Returns whether it has lived, waited its turn, waited for an answer, or been without a pipeline for too long.

    `none_open_since_s`: None while a pipeline is open. `suspended_since_s`: since when its own waits for a holder.
    """
    if now_s - request.arrived_s > settings.max_request_s:
        return True
    due_since_s = request.pace.due_since_s
    is_awaited = request.state is not RequestState.WAITING or request.num_failed_steps > 0
    # Over all steps that failed meanwhile: each of them may have had its whole time.
    if is_awaited and due_since_s is not None and now_s - due_since_s > settings.max_stalled_s:
        return True
    if request.state is not RequestState.WAITING:
        return suspended_since_s is not None and now_s - suspended_since_s > settings.max_outage_s
    if now_s - request.queued_s > settings.max_queue_s:
        return True
    if none_open_since_s is None or request.waits_for_start:
        return False
    # What it had waited for its turn before is not part of the outage.
    return now_s - max(request.queued_s, none_open_since_s) > settings.max_outage_s
