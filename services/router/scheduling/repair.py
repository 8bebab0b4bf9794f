"""After an error of our own: the request that it is about ends, and what does not add up without it starts over."""

from __future__ import annotations

from common.errors import ExecutionError
from common.ids import PipelineId, RequestId
from services.router.scheduling.admission import Admission
from services.router.scheduling.blame import Blame
from services.router.scheduling.line import Line
from services.router.scheduling.request import Request, RequestState
from services.router.scheduling.schedules import PipelineSchedules
from services.router.scheduling.settings import SchedulerSettings
from services.router.scheduling.snapshot import SchedulerCounters
from services.router.scheduling.step_plan import RequestFailure
from services.router.scheduling.waiting_line import WaitingLine


class Repair:
    """Works on what the scheduler owns, and trusts none of it."""

    def __init__(
        self,
        requests: dict[RequestId, Request],
        waiting: WaitingLine,
        schedules: PipelineSchedules,
        admission: Admission,
        line: Line,
        blame: Blame,
        counters: SchedulerCounters,
        settings: SchedulerSettings,
    ) -> None:
        self._requests = requests
        self._waiting = waiting
        self._schedules = schedules
        self._admission = admission
        self._line = line
        self._blame = blame
        self._counters = counters
        self._settings = settings
        self._renewals: list[PipelineId] = []

    def take_renewals(self) -> list[PipelineId]:
        """Pipelines that have started over since the last call: they need a new generation."""
        renewals, self._renewals = self._renewals, []
        return renewals

    def end_broken(self, now_s: float) -> list[RequestFailure]:
        """Requests whose handling raised fail, and with them nothing else. A pipeline whose blocks do not add up after
        that starts over: what ran there is computed again."""
        broken = self._blame.take()
        if not broken:
            return []
        failures = [self._end(request, cause) for request, cause in broken]
        for schedule in self._schedules.all:
            try:
                schedule.check_invariants()
            except Exception:  # whatever was left half done
                self.start_over(schedule.pipeline, now_s)
        self._waiting.requests[:] = sorted(
            (request for request in self._requests.values() if request.state is RequestState.WAITING),
            key=lambda request: request.arrival,
        )
        self._admission.recount(request.generation_request for request in self._requests.values())
        return [failure for failure in failures if failure is not None]

    def _end(self, request: Request, cause: Exception) -> RequestFailure | None:
        """It may be half in one place and half in another: whatever of it is left is looked for, not assumed."""
        for schedule in self._schedules.all:
            if request in schedule.running:
                try:
                    schedule.withdraw(request)
                except Exception:  # the pipeline's own check sees what it still holds
                    schedule.running = [other for other in schedule.running if other is not request]
        if self._requests.pop(request.request_id, None) is None and request.state is not RequestState.FINISHED:
            return None  # its client was gone
        self._line.leave(request.generation_request)
        request.state = RequestState.FAILED
        self._counters.requests_failed += 1
        error = ExecutionError(
            f"the router failed while it handled request {request.request_id} ({type(cause).__name__}: {cause}); "
            "other requests go on"
        )
        return RequestFailure(request.request_id, error, cause)

    def charge_all(self, pipeline: PipelineId, cause: Exception) -> None:
        """Planning raised, and not over one request: each that runs there has one try less, so that it ends."""
        for request in self._schedules.of(pipeline).running:
            request.num_failed_steps += 1
            if request.num_failed_steps > self._settings.max_failed_steps:
                with self._blame.handling(request):
                    raise cause

    def start_over(self, pipeline: PipelineId, now_s: float) -> None:
        """Nothing of its blocks and steps is gone on with."""
        requests = [request for request in self._requests.values() if request.pipeline == pipeline]
        sequence_ids = [request.sequence_id for request in requests if request.sequence_id is not None]
        self._schedules.discard(pipeline, sequence_ids, now_s)
        self._renewals.append(pipeline)
        for request in requests:
            self._counters.tokens_recomputed += request.num_computed_tokens
            request.num_recoveries += 1
            request.start_over(now_s)
            self._waiting.insert(request)
