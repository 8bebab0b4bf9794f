"""Which wait is over when: in line, without any pipeline, and both one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.ids import Generation, PipelineId
from services.router.scheduling.scheduler import Scheduler
from tests.support.router.scheduling import P0, add, make_scheduler, only_plan


@pytest.mark.parametrize("ends", [Scheduler.suspend_pipeline, Scheduler.close_pipeline])
def test_time_in_line_before_an_outage_does_not_count_as_outage(
    ends: Callable[[Scheduler, PipelineId, float], None],
) -> None:
    scheduler = make_scheduler(max_batch_sequences=1, num_blocks=4, max_outage_s=30.0, max_queue_s=600.0)
    add(scheduler, "a", "b", prompt_length=12, max_tokens=4)
    only_plan(scheduler)
    assert scheduler.schedule(61.0) == []
    assert scheduler.snapshot().num_waiting == 1
    ends(scheduler, P0, 61.0)
    scheduler.schedule(61.05)
    scheduler.open_pipeline(P0, Generation(2), 4, 1, now_s=61.1)
    only_plan(scheduler, 61.1)
    assert scheduler.take_failures() == [], "nobody was without a pipeline for long"
    ends(scheduler, P0, 100.0)
    scheduler.close_pipeline(PipelineId(7), 120.0)  # one that was not open: the outage is as old as before
    scheduler.schedule(130.0)
    assert scheduler.take_failures() == []
    scheduler.schedule(130.1)
    assert [failure.request_id for failure in scheduler.take_failures()] == ["a", "b"]


def test_time_in_line_has_its_end_in_an_outage_too() -> None:
    scheduler = make_scheduler(num_blocks=4, max_outage_s=30.0, max_queue_s=600.0)
    add(scheduler, "a", "b", prompt_length=12, max_tokens=4)
    only_plan(scheduler)
    scheduler.suspend_pipeline(P0, 590.0)
    scheduler.schedule(600.1)
    assert [failure.request_id for failure in scheduler.take_failures()] == ["b"]
