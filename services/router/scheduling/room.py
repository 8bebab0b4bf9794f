"""Room on a pipeline for one more request: what is free, and what others would give up for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from services.router.scheduling.line import group_of
from services.router.scheduling.pipeline_schedule import PipelineSchedule
from services.router.scheduling.request import Request


def has_room(schedule: PipelineSchedule, request: Request) -> bool:
    """Whether its prefill fits beside those under way. Decoding on may still preempt somebody later."""
    num_left = schedule.allocator.num_free - _num_promised(schedule, schedule.running)
    return _fits(schedule, request, len(schedule.running), num_left)


def who_yields_to(schedule: PipelineSchedule, request: Request) -> list[Request]:
    """Who gives place and blocks up so that it has room, youngest first; nobody if that would not do.

    Only those behind it in line, whose HTTP request has others that run here, and who are in no step in flight: one
    request may have all places while nobody else wants any.
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
        if other.step is None and num_by_group[group] > 1 and group != own_group:
            num_by_group[group] -= 1
            yielding.append(other)
            num_left += len(other.block_table) + _num_promised(schedule, [other])
            if _fits(schedule, request, len(schedule.running) - len(yielding), num_left):
                return yielding
    return []


def _fits(schedule: PipelineSchedule, request: Request, num_running: int, num_left: int) -> bool:
    """`num_left`: free blocks that are promised to nobody."""
    if num_running >= schedule.max_running or not schedule.can_ever_hold(request):
        return False
    # A little is left for those that decode, so that a joiner is not preempted at once.
    headroom = schedule.allocator.num_blocks // 64
    return not num_running or num_left - headroom >= schedule.num_blocks_for(request.num_tokens)


def _num_promised(schedule: PipelineSchedule, requests: Sequence[Request]) -> int:
    """Blocks that their prefills will still take."""
    return sum(
        schedule.num_blocks_for(other.num_tokens) - len(other.block_table)
        for other in requests
        if not other.is_decoding
    )
