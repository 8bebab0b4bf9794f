"""Steps on their way: from the scheduler to first stages, back from last stages, and into the sink. In the mesh thread.

What comes of steps waits here until `hand_on`, so that the next steps go out before anything is written or shown. What
goes wrong with a step is told to the scheduler, which recomputes its requests; the pipeline then needs a new
generation, so that its stages forget what they hold half done. Methods return the pipelines that need one.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from common.errors import DeadlineError, ExecutionError, MoemeshError, ProtocolError
from common.ids import PipelineId, RequestId, SequenceId, StepId
from common.messages import StepResult
from common.topology import NodeDescription
from services.router.control.actions import OpenPipeline
from services.router.engine import Token
from services.router.mesh.sockets import MeshClient
from services.router.mesh.status import HopTotals
from services.router.mesh.step_message import (
    computed_by,
    sampled_tokens,
    step_header,
    step_message,
    unsendable_sequences,
)
from services.router.scheduling.pipeline_schedule import StepInFlight
from services.router.scheduling.scheduler import Scheduler

Sink = Callable[[list[tuple[RequestId, Token | MoemeshError]]], None]
"""Where the outcome of requests goes. It is called in the mesh thread, and must return at once."""


class StepFlow:
    """See the module."""

    def __init__(
        self,
        client: MeshClient,
        scheduler: Scheduler,
        step_deadline_s: float,
        vocab_size: int,
        sink: Sink,
        log: structlog.stdlib.BoundLogger,
        note_placement: Callable[[RequestId, SequenceId], None] = lambda request_id, sequence_id: None,
    ) -> None:
        self._note_placement = note_placement
        self._client = client
        self.scheduler = scheduler
        self._step_deadline_s = step_deadline_s
        self._vocab_size = vocab_size
        self._sink = sink
        self._log = log
        self._answered_s: dict[PipelineId, float] = {}
        self._outcomes: list[tuple[RequestId, Token | MoemeshError]] = []
        """They are handed on together, in this order."""
        self.totals = HopTotals()

    def open(self, action: OpenPipeline, first_stage: NodeDescription, now_s: float) -> MoemeshError | None:
        """Lets steps go to this pipeline from now on. Returns why its first stage cannot be connected to, if it cannot,
        for want of a socket or of an address: then the pipeline waits, and the others are not touched."""
        try:
            self._client.open_pipeline(action.pipeline, first_stage)
        except MoemeshError as error:
            self._log.error("pipeline_not_opened", pipeline=action.pipeline, reason=str(error))
            self.suspend(action.pipeline, now_s)
            return error
        self.scheduler.open_pipeline(action, now_s)
        self._log.info("pipeline_open", **action.summary)
        return None

    def suspend(self, pipeline: PipelineId, now_s: float) -> None:
        """Drops what is under way there; its requests wait for the pipeline, with their blocks."""
        self._drop_steps(pipeline)
        self.scheduler.suspend_pipeline(pipeline, now_s)

    def close(self, pipeline: PipelineId, now_s: float) -> None:
        """Drops what is under way there; its requests wait for another place."""
        self._drop_steps(pipeline)
        self.scheduler.close_pipeline(pipeline, now_s)

    def _drop_steps(self, pipeline: PipelineId) -> None:
        self._client.close_pipeline(pipeline)
        self._answered_s.pop(pipeline, None)  # by others, perhaps, than those that hold the slots next

    def send_plans(
        self, now_s: float, is_awaited: Callable[[SequenceId], bool], *, expires: bool = True
    ) -> list[PipelineId]:
        """Sends what the scheduler decides; what a first stage does not take yet goes with the next call.

        `is_awaited`, `expires`: as the scheduler takes them. Pipelines that it has given up need a new generation, and
        those with a step that fits no message: stages would wait for it, since the next one names it.
        """
        self.scheduler.schedule(now_s, is_awaited, expires=expires)
        self.scheduler.plan_canaries(now_s)
        for request_id, sequence_id in self.scheduler.pop_placements():
            self._note_placement(request_id, sequence_id)
        broken = self._send_waiting(now_s)
        self._report_failures()
        given_up = self.scheduler.pop_renewals()
        for pipeline in given_up:
            self._drop_steps(pipeline)
        return broken + given_up

    def _send_waiting(self, now_s: float) -> list[PipelineId]:
        """Returns pipelines with a step that fits no message."""
        broken: list[PipelineId] = []
        waiting: set[PipelineId] = set()
        for step in self.scheduler.steps_in_flight:
            pipeline = step.plan.pipeline
            if step.sent_s is not None or pipeline in waiting or pipeline in broken:
                continue  # the steps of a pipeline go in their order
            try:
                message = step_message(step.plan)
            except Exception as error:  # one request's numbers do not fit it
                known = ExecutionError(f"the step cannot be put into a message: {error}")
                broken.append(self._fail(step, known, now_s))
                continue
            left_ms = max(1, int((step.planned_s + self._step_deadline_s - now_s) * 1000))
            if self._client.send_step(pipeline, message, step_header(step.plan, self._client.router_term, left_ms)):
                step.sent_s = now_s
            else:
                waiting.add(pipeline)  # its first stage does not take it yet
        return broken

    def receive_results(self, now_s: float) -> list[PipelineId]:
        """Receives sampled tokens; `hand_on` hands them on."""
        broken: list[PipelineId] = []
        while (received := self._client.results.receive()) is not None:
            message, header = received
            step, stamp = self.scheduler.step(StepId(header.step)), (header.router_term, header.generation)
            if (
                step is None
                or not isinstance(message, StepResult)
                or stamp != (self._client.router_term, step.plan.generation)
            ):
                self.totals.dropped += 1
                continue
            try:
                if (other := step.overtaken) is not None:
                    raise ProtocolError(
                        f"step {step.plan.step} was answered before step {other}, whose tokens it needs"
                    )
                sampled = sampled_tokens(message, step.plan, self._vocab_size)
            except Exception as error:  # also what was not foreseen: an answer costs its step, not the mesh
                known = error if isinstance(error, MoemeshError) else ExecutionError(f"StepResult: {error}")
                broken.append(self._fail(step, known, now_s))
                continue
            plan = step.plan
            if not plan.computing_slots and step.sent_s is not None:
                self._answered_s[plan.pipeline] = max(step.sent_s, self._answered_s.get(plan.pipeline, step.sent_s))
            if plan.chunks:  # a canary says nothing of how long work takes
                self.totals.pipeline_steps += 1
                # What it waited for the tokens of the step before is that one's time.
                self.totals.pipeline_seconds += now_s - max(step.sent_s or now_s, step.planned_s)
            by = computed_by(message, plan)
            outputs = self.scheduler.complete(plan.step, sampled, now_s, message.retried_calls, by)
            self._outcomes += [(output.request_id, output.token) for output in outputs]
        return broken

    def hand_on(self) -> None:
        """Hands on what has come of requests since the last call, all of it at once."""
        outcomes, self._outcomes = self._outcomes, []
        if outcomes:
            self._sink(outcomes)

    def pop_answered(self) -> dict[PipelineId, float]:
        """Returns when the newest step was sent that all stages computed and that has come back since the last call."""
        answered_s, self._answered_s = self._answered_s, {}
        return answered_s

    def fail_step(self, number: StepId, generation: int, error: MoemeshError, now_s: float) -> list[PipelineId]:
        """Fails a step that a stage could not do. One that is not in flight in this generation is no news."""
        step = self.scheduler.step(number)
        if step is None or step.plan.generation != generation:
            return []
        return [self._fail(step, error, now_s)]

    @property
    def unsent(self) -> set[PipelineId]:
        """Returns pipelines with a step that their first stage has not taken yet."""
        return {step.plan.pipeline for step in self.scheduler.steps_in_flight if step.sent_s is None}

    def check_deadlines(self, now_s: float) -> list[PipelineId]:
        """Fails the steps whose time is up."""
        late = [step for step in self.scheduler.steps_in_flight if now_s >= step.planned_s + self._step_deadline_s]
        return [
            self._fail(step, DeadlineError(f"pipeline {step.plan.pipeline} did not answer a step in time"), now_s)
            for step in late
            if self.scheduler.step(step.plan.step) is not None  # else it went with another of its pipeline
        ]

    def _report_failures(self) -> None:
        """Tells the clients of requests that end here, behind their tokens, and the log what cost no request."""
        for failure in self.scheduler.pop_failures():
            if failure.cause is not None:
                self._log.error("request_crashed", request=failure.request_id, exc_info=failure.cause)
            self._outcomes.append((failure.request_id, failure.error))
        for pipeline, error in self.scheduler.pop_draft_errors():
            self._log.error("drafts_ended", pipeline=pipeline, exc_info=error)

    def refuse(self, request_id: RequestId, error: Exception) -> None:
        """Tells a client that its request is not taken. An error that is not a MoemeshError is the router's own."""
        if not isinstance(error, MoemeshError):
            self._log.error("request_crashed", request=request_id, exc_info=error)
            error = ExecutionError(f"the router failed while it took in request {request_id}: {error}")
        self._outcomes.append((request_id, error))

    def _fail(self, step: StepInFlight, error: MoemeshError, now_s: float) -> PipelineId:
        plan = step.plan
        self._log.error("step_failed", step=plan.step, pipeline=plan.pipeline, code=error.code, reason=str(error))
        culprits = unsendable_sequences(plan) if step.sent_s is None else {}
        self.scheduler.fail_step(plan.step, error, now_s, culprits)
        self._report_failures()
        return plan.pipeline
