"""Pools in which the old take the blocks of the young at every turn, and routers that end: nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.ids import Generation, PipelineId, RequestId, SequenceId
from services.router.engine import GenerationRequest
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from services.router.scheduling.step_plan import StepPlan
from tests.support.router.erring_drafter import ErringDrafter
from tests.support.router.scheduling import is_idle, open_pipeline
from tests.support.router.simulated_pipeline import SimulatedPipeline, build_request, reference_tokens

P0 = PipelineId(0)
TERM_SHIFT = 32


@dataclass
class Journal:
    """What outlives a router."""

    tokens: dict[RequestId, list[int]] = field(default_factory=dict)
    sequence_ids: dict[RequestId, SequenceId] = field(default_factory=dict)


class Life:
    """One router after the other over the same two stages."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        num_blocks: int,
        scheduling: SchedulerSettings,
        most_drafts: int,
    ) -> None:
        self.expected = {request.request_id: reference_tokens(request) for request in requests}
        self.most_drafts = most_drafts
        self.requests, self.num_blocks, self.settings = requests, num_blocks, scheduling
        self.journal = Journal({request.request_id: [] for request in requests})
        self.term = 1
        self.num_preemptions = self.most_victims = 0
        self.scheduler = self.make_scheduler()
        self.stages = SimulatedPipeline(P0, self.generation, num_blocks, scheduling.block_tokens)
        open_pipeline(self.scheduler, P0, self.generation, num_blocks, 2, 0.0)
        for request in requests:
            self.scheduler.add(request, 0.0)
        self.in_flight: list[StepPlan] = []

    @property
    def generation(self) -> Generation:
        return Generation(self.term << TERM_SHIFT)

    def make_scheduler(self) -> Scheduler:
        drafter = ErringDrafter(self.expected, self.most_drafts)
        return Scheduler(self.settings, first_number=self.term << TERM_SHIFT, drafter=drafter)

    def restart(self) -> None:
        """The stages are where they were; what was in flight is gone."""
        self.term += 1
        self.in_flight.clear()
        self.num_preemptions += self.scheduler.counters.preemptions
        self.scheduler = self.make_scheduler()
        for request in self.requests:
            tokens = self.journal.tokens[request.request_id]
            if len(tokens) < request.sampling.max_tokens:
                self.scheduler.add(request.restored(tokens, self.journal.sequence_ids.get(request.request_id)), 0.0)
        held = self.stages.held()
        self.stages.resume(self.generation, (), mirrored=False)
        open_pipeline(self.scheduler, P0, self.generation, self.num_blocks, 2, 0.0, self.stages.marks, held)
        self.scheduler.check_invariants()

    def plan(self) -> None:
        """Send what may be sent."""
        before = self.scheduler.counters.preemptions
        for plan in self.scheduler.schedule(0.0):
            self.stages.send(plan)  # which refuses chunks of sequences that were released
            self.in_flight.append(plan)
        self.most_victims = max(self.most_victims, self.scheduler.counters.preemptions - before)
        self.journal.sequence_ids.update(self.scheduler.pop_placements())
        self.scheduler.check_invariants()

    def answer(self) -> None:
        """The oldest step comes back."""
        plan = self.in_flight.pop(0)
        sampled = self.stages.answer(plan)
        for output in self.scheduler.complete(plan.step, sampled, 0.0):
            self.journal.tokens[output.request_id].append(output.token.token_id)
        self.scheduler.check_invariants()

    def finish(self) -> None:
        """Until everything has ended."""
        for _ in range(5000):
            self.plan()
            if not self.in_flight:
                break
            self.answer()
        assert is_idle(self.scheduler), "work waits and nothing is sent"


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@example(4, 20, 5, [3, 3, 1], 0, 1, 0, [])
@example(4, 20, 5, [3, 3, 1], 0, 1, 3, ["plan", "answer"] * 3 + ["restart", "plan", "answer"] * 2)
@given(
    block_tokens=st.integers(1, 4),
    old_blocks=st.integers(3, 20),
    chunk_blocks=st.integers(1, 6),
    young_prompts=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    spare_blocks=st.integers(0, 2),
    micro_batches=st.integers(1, 2),
    most_drafts=st.integers(0, 4),
    turns=st.lists(st.sampled_from(["plan", "answer", "plan", "answer", "restart"]), max_size=60),
)
def test_whoever_is_preempted_wherever_the_router_ends_every_token_comes_once_and_right(
    block_tokens: int,
    old_blocks: int,
    chunk_blocks: int,
    young_prompts: list[int],
    spare_blocks: int,
    micro_batches: int,
    most_drafts: int,
    turns: list[str],
) -> None:
    # All prompts fit side by side; as soon as the young make tokens, the oldest needs what they hold.
    num_blocks = old_blocks + spare_blocks + sum(-(-length // block_tokens) for length in young_prompts)
    room = num_blocks * block_tokens
    oldest = build_request("oldest", old_blocks * block_tokens, min(4, room - old_blocks * block_tokens), seed=1)
    young = [build_request(f"y{i}", p, min(24, room - p), seed=2 + i) for i, p in enumerate(young_prompts)]
    chunk_tokens = chunk_blocks * block_tokens
    life = Life(
        [oldest, *young],
        num_blocks,
        SchedulerSettings(
            block_tokens=block_tokens,
            max_batch_tokens=64,
            prefill_chunk_tokens=chunk_tokens,
            micro_batches_per_pipeline=micro_batches,
            max_held_releases=1,
        ),
        most_drafts,
    )
    for turn in turns:
        if turn == "restart":
            life.restart()
        elif turn == "plan":
            life.plan()
        elif life.in_flight:
            life.answer()
    life.finish()
    for request in life.requests:
        assert life.journal.tokens[request.request_id] == reference_tokens(request)
