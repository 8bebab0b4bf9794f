"""Requests that a router before this one ran go on with the cache that the stages still have."""

from __future__ import annotations

from collections.abc import Sequence

from common.ids import SequenceId
from services.router.control.adoption import HeldCache
from services.router.scheduling.pipeline_schedule import PipelineSchedule
from services.router.scheduling.request import Request


def adopt_held(schedule: PipelineSchedule, held: HeldCache, waiting: Sequence[Request]) -> list[Request]:
    """Who of the line runs on this pipeline from now on. What nobody claims is released on the stages."""
    owners = {request.held_sequence_id: request for request in waiting if request.held_sequence_id is not None}
    schedule.held_releases.extend(SequenceId(number) for number in held.released)
    adopted: list[Request] = []
    for number, sequence in held.sequences.items():
        request = owners.get(SequenceId(number))
        if request is not None and schedule.adopt(request, sequence, SequenceId(number), held.mark):
            adopted.append(request)
        else:
            schedule.held_releases.append(SequenceId(number))
    return adopted
