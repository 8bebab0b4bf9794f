"""Requests that a router before this one ran go on with the cache that the stages still have."""

from __future__ import annotations

from collections.abc import Sequence

from common.ids import SequenceId, StepId
from services.router.control.adoption import HeldCache
from services.router.scheduling.blame import Blame
from services.router.scheduling.pipeline_schedule import PipelineSchedule
from services.router.scheduling.request import Request


def adopt_held(
    schedule: PipelineSchedule,
    held: HeldCache,
    waiting: Sequence[Request],
    adopted_step: StepId,
    blame: Blame,
    now_s: float,
) -> list[Request]:
    """Who of the line runs on this pipeline from now on. What nobody claims is released on the stages.

    `adopted_step`: what is adopted counts as computed by this step, which nobody ever sees. It comes after all steps of
    routers before and ahead of all of this one, so that no mark of former times stands for it.
    """
    owners = {request.held_sequence_id: request for request in waiting if request.held_sequence_id is not None}
    schedule.held_releases.extend(SequenceId(number) for number in held.released)
    adopted: list[Request] = []
    for number, sequence in held.sequences.items():
        request = owners.get(SequenceId(number))
        is_adopted = False
        if request is not None:
            with blame.handling(request):
                is_adopted = schedule.adopt(request, sequence, SequenceId(number), adopted_step, now_s)
        if request is not None and is_adopted:
            adopted.append(request)
        else:
            schedule.held_releases.append(SequenceId(number))
    return adopted


def adopted_marks(held: HeldCache, kv_marks: Sequence[int], adopted_step: StepId) -> list[int]:
    """By slot, up to which step its holder's cache is good, where those who reported `held` have what was adopted."""
    return [adopted_step if held.is_held_by(slot, kv_mark) else 0 for slot, kv_mark in enumerate(kv_marks)]
