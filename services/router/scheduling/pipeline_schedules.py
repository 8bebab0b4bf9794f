"""All pipelines together: those that are open, and those that wait for a holder with their requests' blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable

from common.ids import PipelineId, SequenceId, StepId
from services.router.control.actions import OpenPipeline
from services.router.scheduling.blocks.prefix_cache import PrefixCounters
from services.router.scheduling.drafts.drafting import Drafter
from services.router.scheduling.pipeline_schedule import PipelineSchedule, StepInFlight
from services.router.scheduling.request import Blame, Request
from services.router.scheduling.settings import SchedulerSettings


class PipelineSchedules:
    """All pipelines that are open or suspended."""

    def __init__(
        self,
        settings: SchedulerSettings,
        blame: Blame,
        prefix_counters: PrefixCounters | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self._settings = settings
        self._blame = blame
        self._prefix_counters = prefix_counters
        self._drafter = drafter
        self.all: dict[PipelineId, PipelineSchedule] = {}
        self._untold_releases: dict[PipelineId, list[SequenceId]] = {}
        """Releases of closed pipelines: a stage that outlives the closing keeps its block tables until it is told."""
        self._last_removed_s = -math.inf

    @property
    def open(self) -> dict[PipelineId, PipelineSchedule]:
        """Returns those that take steps."""
        return {pipeline: schedule for pipeline, schedule in self.all.items() if schedule.suspended_s is None}

    @property
    def pool_sizes(self) -> list[int]:
        """Returns how many blocks each open one has."""
        return [schedule.allocator.num_blocks for schedule in self.open.values()]

    @property
    def none_open_since_s(self) -> float | None:
        """Returns when the last open one was suspended or closed, minus infinity for never; None while one is open."""
        return None if self.open else self._last_removed_s

    def suspended_since_s(self, request: Request) -> float | None:
        """Returns since when the pipeline that a request runs on waits for a holder; None: it does not."""
        schedule = self.all.get(request.pipeline) if request.pipeline is not None else None
        return schedule.suspended_s if schedule is not None else None

    @property
    def steps_in_flight(self) -> list[StepInFlight]:
        """Returns the unanswered steps of open pipelines, in the order in which they were planned."""
        steps = [step for schedule in self.all.values() for step in schedule.in_flight.values()]
        return sorted(steps, key=lambda step: step.plan.step)

    def step(self, number: StepId) -> StepInFlight | None:
        """Returns the step of this number; None if it is not in flight in an open pipeline."""
        steps = (schedule.in_flight.get(number) for schedule in self.all.values())
        return next((step for step in steps if step is not None), None)

    def land(self, number: StepId, now_s: float, *, has_failed: bool = False) -> StepInFlight | None:
        """Ends the step, and returns it; None if it is not in flight any more."""
        step = self.step(number)
        return None if step is None else self.all[step.plan.pipeline].land(number, now_s, has_failed=has_failed)

    def begin(self, opening: OpenPipeline) -> PipelineSchedule:
        """Returns the suspended one, or a new one that tells of what ran there before. Its owner resumes it."""
        if opening.pipeline not in self.all:
            schedule = PipelineSchedule(opening, self._settings, self._blame, self._prefix_counters, self._drafter)
            schedule.held_releases.extend(self._untold_releases.pop(opening.pipeline, []))
            self.all[opening.pipeline] = schedule
        return self.all[opening.pipeline]

    def suspend(self, pipeline: PipelineId, now_s: float) -> None:
        """Lets it take no steps until it is resumed. One that is not open stays as it is."""
        if pipeline in self.open:
            self._last_removed_s = now_s
            self.all[pipeline].suspend(now_s)

    def close(self, pipeline: PipelineId, now_s: float) -> list[Request]:
        """Forgets it. Returns the requests that ran there, without cache, by arrival."""
        if pipeline not in self.all:
            return []
        schedule = self._remove(pipeline, now_s)
        requests = schedule.abandon()
        self._untold_releases[pipeline] = schedule.held_releases
        return requests

    def discard(self, pipeline: PipelineId, sequence_ids: Iterable[SequenceId], now_s: float) -> None:
        """Forgets one whose blocks do not add up. Stages are told to forget `sequence_ids`, and what they were to be
        told anyway, when it opens again."""
        schedule = self._remove(pipeline, now_s)
        told = [*schedule.held_releases, *sequence_ids]
        for step in schedule.in_flight.values():
            told += step.plan.released
            told += (chunk.sequence_id for chunk in step.plan.chunks)
        self._untold_releases[pipeline] = list(dict.fromkeys(told))

    def _remove(self, pipeline: PipelineId, now_s: float) -> PipelineSchedule:
        schedule = self.all.pop(pipeline)
        if schedule.suspended_s is None:
            self._last_removed_s = now_s
        return schedule
