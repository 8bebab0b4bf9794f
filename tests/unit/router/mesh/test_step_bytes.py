"""What one client's penalties and biases cost in every step: of what does not change, nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.ids import Generation, PipelineId
from common.messages import Header
from common.wire.codec import encode
from services.router.engine import Token
from services.router.mesh.step_message import step_message
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from services.router.scheduling.step_plan import StepPlan
from tests.support.router.scheduling import open_pipeline
from tests.support.router.simulated_pipeline import build_request

P0 = PipelineId(0)
BIASES = tuple((token_id, 0.5) for token_id in range(1024))
NUM_SEQUENCES = 64


def step_bytes(plan: StepPlan) -> int:
    return sum(memoryview(frame).nbytes for frame in encode(step_message(plan), Header()))


def answer(scheduler: Scheduler, plan: StepPlan) -> None:
    sampled = {chunk.sequence_id: (Token(7),) for chunk in plan.chunks if chunk.samples}
    scheduler.complete(plan.step, sampled, 0.0)


def sizes_after_the_first(changes: dict[str, object], num_steps: int = 20) -> list[int]:
    """Bytes of the steps in which 64 sequences decode, behind their first ones, and once more after a takeover."""
    scheduler = Scheduler(SchedulerSettings(32, max_batch_tokens=1 << 16, prefill_chunk_tokens=1024, plans_ahead=False))
    open_pipeline(scheduler, P0, Generation(1), 4096, 1, 0.0)
    for number in range(NUM_SEQUENCES):
        request = build_request(f"r{number}", 500, 200, seed=0)
        scheduler.add(replace(request, sampling=replace(request.sampling, seed=number, **changes)), 0.0)  # type: ignore[arg-type]
    sizes: list[int] = []
    for number in range(num_steps):
        (plan,) = scheduler.schedule(0.0)
        assert len(plan.chunks) == NUM_SEQUENCES
        sizes.append(step_bytes(plan))
        answer(scheduler, plan)
        if number == num_steps // 2:
            scheduler.suspend_pipeline(P0, 0.0)
            open_pipeline(scheduler, P0, Generation(2), 4096, 1, 0.0, kv_marks=(plan.step,))
    first_again = num_steps // 2 + 1
    assert sizes[0] > sizes[1]
    assert sizes[first_again] > sizes[first_again + 1], "whole after a new generation"
    return sizes[1:first_again] + sizes[first_again + 1 :]


@pytest.mark.parametrize(
    "changes",
    [{"logit_bias": BIASES}, {"repetition_penalty": 1.1}, {"logit_bias": BIASES, "presence_penalty": 0.5}],
    ids=["biases", "a default repetition penalty", "both"],
)
def test_a_step_of_64_sequences_costs_24_bytes_more_a_row_for_any_number_of_biases_and_counts(
    changes: dict[str, object],
) -> None:
    plain = step_bytes_of_plain()
    assert max(sizes_after_the_first(changes)) <= plain + NUM_SEQUENCES * 24 + 16


def step_bytes_of_plain() -> int:
    scheduler = Scheduler(SchedulerSettings(32, max_batch_tokens=1 << 16, prefill_chunk_tokens=1024, plans_ahead=False))
    open_pipeline(scheduler, P0, Generation(1), 4096, 1, 0.0)
    for number in range(NUM_SEQUENCES):
        scheduler.add(build_request(f"r{number}", 500, 200, seed=0), 0.0)
    largest = 0
    for number in range(20):
        (plan,) = scheduler.schedule(0.0)
        largest = max(largest, step_bytes(plan)) if number else 0
        answer(scheduler, plan)
    return largest
