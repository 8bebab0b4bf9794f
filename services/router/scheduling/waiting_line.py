"""The line: which requests wait, on which pipeline with room each is placed, and which come back."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count

from common.ids import PipelineId, RequestId, SequenceId
from services.router.engine import GenerationRequest
from services.router.scheduling.admission import group_of, num_ahead
from services.router.scheduling.pipeline_schedule import PipelineSchedule
from services.router.scheduling.pipeline_schedules import PipelineSchedules
from services.router.scheduling.pipeline_selection import PipelineSelection
from services.router.scheduling.request import Blame, Request
from services.router.scheduling.snapshot import SchedulerCounters


class WaitingLine:
    """Holds the requests that wait, oldest first: by `Request.arrival`."""

    def __init__(
        self,
        schedules: PipelineSchedules,
        selection: PipelineSelection,
        blame: Blame,
        counters: SchedulerCounters,
        first_number: int,
    ) -> None:
        """Numbers of sequences count up from `first_number`."""
        self.requests: list[Request] = []
        self._schedules = schedules
        self._selection = selection
        self._blame = blame
        self._counters = counters
        self._placements: list[tuple[RequestId, SequenceId]] = []
        self._sequence_numbers = count(first_number + 1)

    def num_ahead(self, newcomer: GenerationRequest | None, max_waiting: int) -> int:
        """Counts choices that wait, as far as a newcomer is concerned; None: one of a request that is not here yet."""
        return num_ahead((request.generation_request for request in self.requests), newcomer, max_waiting)

    def pop_placements(self) -> list[tuple[RequestId, SequenceId]]:
        """Returns the requests placed since the last call, with their numbers."""
        placements, self._placements = self._placements, []
        return placements

    def requeue(self, request: Request, now_s: float) -> None:
        """Puts it back in line, by arrival. The owner of its blocks has taken them back."""
        with self._blame.handling(request):
            self._counters.tokens_recomputed += request.num_computed_tokens
            request.requeue(now_s)
            self.insert(request)

    def insert(self, request: Request) -> None:
        """Puts it in line, at its place."""
        insort(self.requests, request, key=lambda other: other.arrival)

    def place(self, now_s: float, is_awaited: Callable[[SequenceId], bool]) -> None:
        """Places the line on pipelines, oldest first. One that finds no room keeps younger ones off every pipeline that
        could hold it: none overtakes, except on a pool that is too small for the one ahead."""
        kept_free: set[PipelineId] = set()
        for request in list(self.requests):
            if len(kept_free) == len(self._schedules.open):
                break
            with self._blame.handling(request):
                if request.held_sequence_id is None or not is_awaited(request.held_sequence_id):
                    self._place_one(request, kept_free, now_s)

    def _place_one(self, request: Request, kept_free: set[PipelineId], now_s: float) -> None:
        """Places it where the policy chooses, or nowhere: `kept_free` then has the pipelines that it waits for."""
        schedules = self._schedules.open
        fitting = [pipeline for pipeline in schedules if schedules[pipeline].can_ever_hold(request)]
        open_to_it = [pipeline for pipeline in self._selection.usable(fitting, now_s) if pipeline not in kept_free]
        with_room = [schedules[p] for p in open_to_it if has_room(schedules[p], request)]
        of_use = with_room if len(with_room) > 1 else []  # else there is nothing to choose
        choice = self._selection.choose(with_room, [schedule.prefixes.num_found(request) for schedule in of_use])
        if choice is None:
            choice = self._make_room(request, open_to_it, now_s)
        if choice is None:
            kept_free.update(fitting)
            return
        self.requests.remove(request)
        if request.is_new:
            self._counters.waits.note(now_s - request.arrived_s)
        sequence_id = SequenceId(next(self._sequence_numbers))
        schedules[choice].admit(request, sequence_id, now_s)
        self._placements.append((request.request_id, sequence_id))

    def _make_room(self, request: Request, pipelines: Sequence[PipelineId], now_s: float) -> PipelineId | None:
        """Lets choices of another request that stand behind this one in line, and are not the only one of theirs that
        runs, give up their places and blocks for it."""
        for pipeline in pipelines:
            schedule = self._schedules.all[pipeline]
            victims = who_yields_to(schedule, request)
            for victim in victims:
                with self._blame.handling(victim):
                    schedule.withdraw(victim)
                    self._counters.preemptions += 1
                    self.requeue(victim, now_s)
            if victims and has_room(schedule, request):
                return pipeline
        return None


def has_room(schedule: PipelineSchedule, request: Request) -> bool:
    """Returns whether its prefill fits beside those under way. Decoding on may still preempt another later."""
    num_left = schedule.allocator.num_free - _num_promised(schedule, schedule.running)
    return _fits(schedule, request, len(schedule.running), num_left)


def who_yields_to(schedule: PipelineSchedule, request: Request) -> list[Request]:
    """Returns which give place and blocks up so that it has room, youngest first; none if that would not do.

    Only those behind it in line, whose HTTP request has others that run here, and that are in no step in flight: one
    request may have all places while no other wants any.
    """
    if not schedule.running or schedule.running[-1].arrival < request.arrival:
        return []
    own_group = group_of(request.generation_request)
    num_by_group = Counter(group_of(other.generation_request) for other in schedule.running)
    num_left = schedule.allocator.num_free - _num_promised(schedule, schedule.running)
    yielding: list[Request] = []
    for other in reversed(schedule.running):
        if other.arrival < request.arrival:
            break
        group = group_of(other.generation_request)
        if not other.steps and num_by_group[group] > 1 and group != own_group:
            num_by_group[group] -= 1
            yielding.append(other)
            num_left += schedule.num_blocks_alone(other) + _num_promised(schedule, [other])
            if _fits(schedule, request, len(schedule.running) - len(yielding), num_left):
                return yielding
    return []


def _fits(schedule: PipelineSchedule, request: Request, num_running: int, num_left: int) -> bool:
    """Returns whether it fits. `num_left`: free blocks that are not promised."""
    if num_running >= schedule.max_running or not schedule.can_ever_hold(request):
        return False
    # A little is left for those that decode, so that a joiner is not preempted at once.
    headroom = schedule.allocator.num_blocks // 64
    lacking = schedule.num_blocks_for(request.num_tokens) - (num_left - headroom)
    return not num_running or lacking <= 0 or schedule.prefixes.holds(request, lacking)


def _num_promised(schedule: PipelineSchedule, requests: Sequence[Request]) -> int:
    """Counts blocks that their prefills will still take."""
    return sum(
        schedule.num_blocks_for(other.num_tokens) - len(other.block_table)
        for other in requests
        if not other.is_decoding
    )
