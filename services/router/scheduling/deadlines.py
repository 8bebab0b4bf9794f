"""Every wait has an end: which one is over for a request. Pure; time is an argument."""

from __future__ import annotations

from services.router.scheduling.request import Request, RequestState
from services.router.scheduling.settings import SchedulerSettings


def is_late(
    request: Request,
    settings: SchedulerSettings,
    now_s: float,
    none_open_since_s: float | None,
    suspended_since_s: float | None,
) -> bool:
    """Whether it has lived, waited its turn, waited for an answer, or been without a pipeline for too long.

    `none_open_since_s`: None while a pipeline is open. `suspended_since_s`: since when its own waits for a holder.
    """
    if now_s - request.arrived_s > settings.max_request_s:
        return True
    due_since_s = request.pace.due_since_s
    is_awaited = request.state is not RequestState.WAITING or request.num_failed_steps > 0
    # Over all steps that failed meanwhile: each of them may have had its whole time.
    if is_awaited and due_since_s is not None and now_s - due_since_s > settings.max_stalled_s:
        return True
    if request.state is not RequestState.WAITING:
        return suspended_since_s is not None and now_s - suspended_since_s > settings.max_outage_s
    if now_s - request.queued_s > settings.max_queue_s:
        return True
    if none_open_since_s is None or request.waits_for_start:
        return False
    # What it had waited for its turn before is no part of the outage.
    return now_s - max(request.queued_s, none_open_since_s) > settings.max_outage_s
