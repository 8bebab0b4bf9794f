"""The scheduler as metrics and the status page see it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from services.router.control.readiness import PipelineEvidence
from services.router.scheduling.blocks.prefix_cache import PrefixCounters
from services.router.scheduling.pace import awaited, most_overdue
from services.router.scheduling.pipeline_schedule import PipelineSchedule
from services.router.scheduling.request import Request

WAIT_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper ends of a histogram's buckets; one without an end follows."""


@dataclass(slots=True)
class WaitTimes:
    """How long requests stood in the queue before they were first given a place: a histogram."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(WAIT_BOUNDS_S) + 1))
    """Counts by bucket, each without those below it."""
    total_s: float = 0.0

    def note(self, wait_s: float) -> None:
        """Notes one more."""
        self.counts[bisect_left(WAIT_BOUNDS_S, wait_s)] += 1
        self.total_s += wait_s


@dataclass(slots=True)
class SchedulerCounters:
    """What was counted since the start; each only grows."""

    requests_finished: int = 0
    requests_cancelled: int = 0
    requests_failed: int = 0
    steps_planned: int = 0
    steps_planned_ahead: int = 0
    """Those of them whose tokens were not known yet."""
    steps_with_drafts: int = 0
    drafts_planned: int = 0
    """Guessed tokens that were to be computed; where a step failed, it is not known whether they are right."""
    drafts_accepted: int = 0
    """Those that were right; each has saved a step of its request."""
    drafts_rejected: int = 0
    tokens_planned: int = 0
    tokens_generated: int = 0
    tokens_recomputed: int = 0
    """Cached tokens that were given up with a preemption, a failed step or a pipeline."""
    tokens_replayed: int = 0
    """Positions rebuilt on a slot's new holder while the other slots kept theirs."""
    requests_adopted: int = 0
    """Requests of a router before this one that went on with the cache that stages still had."""
    preemptions: int = 0
    failed_steps: int = 0
    waits: WaitTimes = field(default_factory=WaitTimes)
    prefixes: PrefixCounters = field(default_factory=PrefixCounters)


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """For metrics and the status page."""

    num_waiting: int = 0
    num_running: int = 0
    reserved_tokens: int = 0
    pipelines: tuple[PipelineEvidence, ...] = ()
    """What is judged of the open ones, by id, without their holders: roles know those."""
    counters: SchedulerCounters = field(default_factory=SchedulerCounters)
    num_ahead: int = 0
    """How many of those that wait count for the door of a request that comes now; see `admission.num_ahead`."""
    num_free_blocks: int = 0
    """Blocks of open pipelines that no sequence holds."""
    num_cached_blocks: int = 0
    """Blocks of open pipelines, held or not, in which a request may find what it needs."""
    num_tier_slots: int = 0
    """Blocks that the session tiers of open pipelines have room for."""
    num_kept_blocks: int = 0
    """Blocks that are in there."""
    num_steps_in_flight: int = 0
    """Steps that are not canaries."""


def pipeline_evidence(schedule: PipelineSchedule) -> PipelineEvidence:
    """Returns what is to be judged of it now."""
    usual_s = _usual_step_s(schedule)
    canaries = [step for step in schedule.in_flight.values() if step.is_canary]
    steps = [step for step in schedule.in_flight.values() if not step.is_canary]
    return PipelineEvidence(
        pipeline=schedule.pipeline,
        holders=(),
        step=most_overdue([awaited(step.planned_s, usual_s) for step in steps]),
        token=most_overdue(
            [awaited(_waits_since_s(request, schedule), request.pace.usual_s, usual_s) for request in schedule.running]
        ),
        canary_sent_s=min((step.planned_s for step in canaries), default=None),
        last_work_s=schedule.pace.last_work_s,
        has_answered=schedule.pace.has_answered,
    )


def _usual_step_s(schedule: PipelineSchedule) -> float | None:
    """Returns how long the slowest step in flight usually takes; where none is, a step of one token."""
    sizes = [step.plan.num_tokens for step in schedule.in_flight.values() if step.plan.chunks] or [1]
    return max((seconds for size in sizes if (seconds := schedule.pace.usual_s(size)) is not None), default=None)


def _waits_since_s(request: Request, schedule: PipelineSchedule) -> float:
    """Returns since when a running request is to get further."""
    pace = request.pace
    if pace.due_since_s is not None:
        return pace.due_since_s
    if request.is_decoding and not request.is_replaying:
        return pace.progressed_s  # it is part of every round
    return max(pace.progressed_s, schedule.pace.last_success_s)  # its turn comes when others get on
