"""The line: who waits, who of it is placed on which pipeline, and who comes back to it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from itertools import count

from common.ids import PipelineId, RequestId, SequenceId
from services.router.engine import GenerationRequest
from services.router.scheduling.blame import Blame
from services.router.scheduling.line import num_ahead
from services.router.scheduling.pipeline_selection import PipelineSelection
from services.router.scheduling.request import Request
from services.router.scheduling.room import has_room, who_yields_to
from services.router.scheduling.schedules import PipelineSchedules
from services.router.scheduling.snapshot import SchedulerCounters


class WaitingLine:
    """Oldest first: by `Request.arrival`."""

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
        """How many wait, as far as a newcomer's door is concerned; None: one of a request that is not here yet."""
        return num_ahead((request.generation_request for request in self.requests), newcomer, max_waiting)

    def take_placements(self) -> list[tuple[RequestId, SequenceId]]:
        """Who was placed since the last call, under which number."""
        placements, self._placements = self._placements, []
        return placements

    def requeue(self, request: Request, now_s: float) -> None:
        """Back in line by arrival. The owner of its blocks has taken them back."""
        with self._blame.handling(request):
            self._counters.tokens_recomputed += request.num_computed_tokens
            request.requeue(now_s)
            self.insert(request)

    def insert(self, request: Request) -> None:
        """At its place."""
        insort(self.requests, request, key=lambda other: other.arrival)

    def place(self, now_s: float, is_awaited: Callable[[SequenceId], bool]) -> None:
        """Place the line on pipelines, oldest first. One that finds no room keeps younger ones off every pipeline that
        could hold it: nobody overtakes, except on a pool that is too small for the one ahead."""
        kept_free: set[PipelineId] = set()
        for request in list(self.requests):
            if len(kept_free) == len(self._schedules.open):
                break
            with self._blame.handling(request):
                if request.held_sequence_id is None or not is_awaited(request.held_sequence_id):
                    self._place_one(request, kept_free, now_s)

    def _place_one(self, request: Request, kept_free: set[PipelineId], now_s: float) -> None:
        """On the pipeline that the policy chooses, or nowhere: `kept_free` then has those that it waits for."""
        schedules = self._schedules.open
        fitting = [pipeline for pipeline in schedules if schedules[pipeline].can_ever_hold(request)]
        open_to_it = [pipeline for pipeline in self._selection.usable(fitting, now_s) if pipeline not in kept_free]
        choice = self._selection.choose([schedules[p].load() for p in open_to_it if has_room(schedules[p], request)])
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
        """Choices of another request that stand behind this one in line, and are not the only one of theirs that runs,
        give their places and blocks up for it."""
        for pipeline in pipelines:
            schedule = self._schedules.open[pipeline]
            victims = who_yields_to(schedule, request)
            for victim in victims:
                with self._blame.handling(victim):
                    schedule.withdraw(victim)
                    victim.num_preemptions += 1
                    self._counters.preemptions += 1
                    self.requeue(victim, now_s)
            if victims and has_room(schedule, request):
                return pipeline
        return None
