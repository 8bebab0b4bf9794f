"""What must hold of the scheduler at any time. For tests, and cheap enough for a debugger."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.scheduling.pipeline_schedule import PipelineSchedule
from services.router.scheduling.request import Request, RequestState


def check_scheduler(
    requests: Sequence[Request],
    waiting: Sequence[Request],
    schedules: Sequence[PipelineSchedule],
    reserved_tokens: int,
) -> None:
    """AssertionError if a request is lost or in two places, or blocks or reserved tokens do not add up."""
    placed = list(waiting)
    for schedule in schedules:
        schedule.check_invariants()
        placed += schedule.running
    assert len(placed) == len({id(request) for request in placed}), "a request is in two places"
    assert {id(request) for request in placed} == set(map(id, requests)), "a request is lost"
    for request in waiting:
        assert request.state is RequestState.WAITING, f"{request.request_id} is {request.state} and waits"
        assert not request.block_table, f"{request.request_id} waits and holds blocks"
        assert request.step is None, f"{request.request_id} waits and is in flight"
    arrivals = [request.arrival for request in waiting]
    assert arrivals == sorted(arrivals), "the line is out of order"
    assert reserved_tokens == sum(request.max_num_tokens for request in placed), "reserved tokens do not add up"
