"""All pipelines of a scheduler: open, suspended, and what stages must still be told of those that were closed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from common.ids import Generation, PipelineId, SequenceId, StepId
from services.router.scheduling.blame import Blame
from services.router.scheduling.pipeline_schedule import PipelineSchedule, StepInFlight
from services.router.scheduling.request import Request
from services.router.scheduling.settings import SchedulerSettings


class PipelineSchedules:
    """A pipeline is in `open`, in `suspended` or nowhere."""

    def __init__(self, settings: SchedulerSettings, blame: Blame) -> None:
        self._settings = settings
        self._blame = blame
        self.open: dict[PipelineId, PipelineSchedule] = {}
        self.suspended: dict[PipelineId, PipelineSchedule] = {}
        """Pipelines that wait for a holder; their requests keep their blocks."""
        self._untold_releases: dict[PipelineId, list[SequenceId]] = {}
        """Of closed pipelines: a stage that outlives the closing keeps its block tables until it is told."""
        self._last_taken_off_s = -math.inf

    @property
    def all(self) -> list[PipelineSchedule]:
        """Open and suspended ones."""
        return [*self.open.values(), *self.suspended.values()]

    @property
    def pool_sizes(self) -> list[int]:
        """Blocks of each open one."""
        return [schedule.allocator.num_blocks for schedule in self.open.values()]

    @property
    def none_open_since_s(self) -> float | None:
        """When the last open one was suspended or closed (minus infinity: none has been open); None while one is."""
        return None if self.open else self._last_taken_off_s

    def of(self, pipeline: PipelineId) -> PipelineSchedule:
        """The open or suspended one. KeyError if there is none."""
        return self.open.get(pipeline) or self.suspended[pipeline]

    def suspended_since_s(self, request: Request) -> float | None:
        """Since when the pipeline that a request runs on waits for a holder; None: it does not."""
        schedule = self.suspended.get(request.pipeline) if request.pipeline is not None else None
        return schedule.suspended_s if schedule is not None else None

    def land(
        self,
        step: StepId,
        pipeline: PipelineId,
        generation: Generation,
        attempt: int,
        now_s: float,
        *,
        has_failed: bool = False,
    ) -> StepInFlight | None:
        """The step is answered. None if it is not in flight in that generation and attempt."""
        schedule = self.open.get(pipeline)
        in_flight = schedule.in_flight.get(step) if schedule is not None else None
        if schedule and in_flight and (schedule.generation, in_flight.plan.attempt) == (generation, attempt):
            return schedule.land(step, now_s, has_failed=has_failed)
        return None

    def is_of_another_size(self, pipeline: PipelineId, num_blocks: int, num_slots: int) -> bool:
        """Whether a suspended one cannot go on like this."""
        schedule = self.suspended.get(pipeline)
        return schedule is not None and (schedule.allocator.num_blocks, schedule.num_slots) != (num_blocks, num_slots)

    def begin(self, pipeline: PipelineId, generation: Generation, num_blocks: int, num_slots: int) -> PipelineSchedule:
        """Open the suspended one, or a new one that tells of what ran there before. Its owner resumes it."""
        schedule = self.suspended.pop(pipeline, None)
        if schedule is None:
            schedule = PipelineSchedule(pipeline, generation, num_blocks, num_slots, self._settings, self._blame)
            schedule.held_releases.extend(self._untold_releases.pop(pipeline, []))
        self.open[pipeline] = schedule
        return schedule

    def suspend(self, pipeline: PipelineId, now_s: float) -> None:
        """It takes no steps until `begin`. One that is not open stays as it is."""
        schedule = self._take_off(pipeline, now_s)
        if schedule is not None:
            schedule.suspend(now_s)
            self.suspended[pipeline] = schedule

    def close(self, pipeline: PipelineId, now_s: float) -> list[Request]:
        """Forget it; who ran there, without cache, by arrival."""
        schedule = self._take_off(pipeline, now_s) or self.suspended.pop(pipeline, None)
        if schedule is None:
            return []
        requests = schedule.abandon()
        self._untold_releases[pipeline] = schedule.held_releases
        return requests

    def discard(self, pipeline: PipelineId, sequence_ids: Iterable[SequenceId], now_s: float) -> None:
        """Forget one whose blocks do not add up. Stages are told to forget `sequence_ids`, and what they were to be
        told anyway, when it opens again."""
        schedule = self._take_off(pipeline, now_s) or self.suspended.pop(pipeline)
        told = [*schedule.held_releases, *sequence_ids]
        for step in schedule.in_flight.values():
            told += step.plan.released
            told += (chunk.sequence_id for chunk in step.plan.chunks)
        self._untold_releases[pipeline] = list(dict.fromkeys(told))

    def _take_off(self, pipeline: PipelineId, now_s: float) -> PipelineSchedule | None:
        """It is open no longer; None if it was not."""
        schedule = self.open.pop(pipeline, None)
        if schedule is not None:
            self._last_taken_off_s = now_s
        return schedule
