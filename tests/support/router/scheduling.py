"""A scheduler, requests for it, and its plans in a few letters."""

from common.ids import Generation, PipelineId
from services.router.engine import Token
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from services.router.scheduling.step_plan import StepPlan, TokenOutput
from tests.support.router.simulated_pipeline import build_request

P0, P1 = PipelineId(0), PipelineId(1)


def make_scheduler(num_blocks: int = 100, num_slots: int = 1, **changes: object) -> Scheduler:
    fields: dict[str, object] = {"block_tokens": 4, **changes}
    scheduler = Scheduler(SchedulerSettings(**fields))  # type: ignore[arg-type]
    scheduler.open_pipeline(P0, Generation(1), num_blocks, num_slots, now_s=0.0)
    return scheduler


def add(scheduler: Scheduler, *names: str, prompt_length: int = 4, max_tokens: int = 10, now_s: float = 0.0) -> None:
    for name in names:
        scheduler.add(build_request(name, prompt_length, max_tokens, seed=ord(name[0])), now_s)


def only_plan(scheduler: Scheduler, now_s: float = 0.0) -> StepPlan:
    (plan,) = scheduler.schedule(now_s)
    return plan


def complete(scheduler: Scheduler, plan: StepPlan, token_id: int = 1, now_s: float = 0.0) -> list[TokenOutput]:
    sampled = {chunk.sequence_id: Token(token_id) for chunk in plan.chunks if chunk.samples}
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
