"""A scheduler, requests for it, and its plans in a few letters."""

from collections.abc import Sequence

from common.ids import Generation, NodeId, PipelineId
from services.router.control.actions import OpenPipeline
from services.router.control.adoption import HeldCache
from services.router.engine import Token
from services.router.scheduling.drafts.drafting import Drafter
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from services.router.scheduling.step_plan import StepPlan, TokenOutput
from tests.support.router.simulated_pipeline import build_request

P0, P1 = PipelineId(0), PipelineId(1)


def make_scheduler(
    num_blocks: int = 100,
    num_slots: int = 1,
    num_tier_slots: int = 0,
    drafter: Drafter | None = None,
    **changes: object,
) -> Scheduler:
    """One that plans nothing ahead, so that each step has the tokens of those before it, unless it is told to."""
    fields: dict[str, object] = {"block_tokens": 4, "plans_ahead": False, **changes}
    scheduler = Scheduler(SchedulerSettings(**fields), drafter=drafter)  # type: ignore[arg-type]
    open_pipeline(scheduler, P0, Generation(1), num_blocks, num_slots, now_s=0.0, num_tier_slots=num_tier_slots)
    return scheduler


def open_pipeline(
    scheduler: Scheduler,
    pipeline: PipelineId,
    generation: Generation,
    num_blocks: int,
    num_slots: int,
    now_s: float,
    kv_marks: Sequence[int] = (),
    held: HeldCache | None = None,
    num_tier_slots: int = 0,
    tier_since: int = 0,
) -> None:
    opening = OpenPipeline(
        pipeline,
        generation,
        NodeId("first"),
        num_blocks,
        num_slots,
        tuple(kv_marks),
        held,
        num_tier_slots,
        tier_since,
    )
    scheduler.open_pipeline(opening, now_s)


def add(scheduler: Scheduler, *names: str, prompt_length: int = 4, max_tokens: int = 10, now_s: float = 0.0) -> None:
    for name in names:
        scheduler.add(build_request(name, prompt_length, max_tokens, seed=ord(name[0])), now_s)


def only_plan(scheduler: Scheduler, now_s: float = 0.0) -> StepPlan:
    (plan,) = scheduler.schedule(now_s)
    return plan


def complete(scheduler: Scheduler, plan: StepPlan, token_id: int = 1, now_s: float = 0.0) -> list[TokenOutput]:
    sampled = {chunk.sequence_id: (Token(token_id),) for chunk in plan.chunks if chunk.samples}
    outputs = scheduler.complete(plan.step, sampled, now_s)
    scheduler.check_invariants()
    return outputs


def is_idle(scheduler: Scheduler) -> bool:
    """Nothing waits, runs or is in flight, but for canaries."""
    seen = scheduler.snapshot()
    return not (seen.num_waiting or seen.num_running) and all(step.is_canary for step in scheduler.steps_in_flight)


def names_in(plan: StepPlan) -> list[str]:
    """Requests are told by their seed."""
    return [chr(chunk.sampling.seed) for chunk in plan.chunks]


def lengths_in(plan: StepPlan) -> list[int]:
    return [len(chunk.token_ids) for chunk in plan.chunks]
