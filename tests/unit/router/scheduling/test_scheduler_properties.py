"""Whatever happens, in whatever order: every token once, in order, right; no block lost."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.errors import ContextLengthError, ExecutionError, OverloadedError
from common.ids import Generation, PipelineId, RequestId
from services.router.engine import FinishReason, GenerationRequest
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from services.router.scheduling.step_plan import UNKNOWN, ComputedBy, RequestFailure, StepPlan, TokenOutput
from tests.support.router.erring_drafter import ErringDrafter
from tests.support.router.scheduling import is_idle, open_pipeline
from tests.support.router.simulated_pipeline import SimulatedPipeline, build_request, reference_tokens

PIPELINES = [PipelineId(0), PipelineId(1)]


class SchedulerMachine(RuleBasedStateMachine):
    """Random adds, cancels, answers in any order that stages keep, failed steps, pipelines that close and open."""

    caches_prefixes = False

    @initialize(
        block_tokens=st.integers(1, 4),
        max_batch_tokens=st.integers(1, 12),
        max_batch_sequences=st.integers(1, 5),
        prefill_chunk_tokens=st.integers(1, 8),
        micro_batches=st.one_of(st.none(), st.integers(1, 3)),
        min_decode_share=st.integers(1, 9),
        max_held_releases=st.integers(0, 4),
        plans_ahead=st.booleans(),
        policy=st.sampled_from(["least_in_flight", "weighted"]),
        num_blocks=st.integers(4, 14),
        most_drafts=st.integers(0, 8),
        draft_rate=st.sampled_from([0.0, 0.8]),
        num_tier_slots=st.integers(0, 8),
    )
    def start(
        self,
        block_tokens: int,
        max_batch_tokens: int,
        max_batch_sequences: int,
        prefill_chunk_tokens: int,
        micro_batches: int | None,
        min_decode_share: int,
        max_held_releases: int,
        plans_ahead: bool,
        policy: str,
        num_blocks: int,
        most_drafts: int,
        draft_rate: float,
        num_tier_slots: int,
    ) -> None:
        self.num_tier_slots = num_tier_slots
        self.settings = SchedulerSettings(
            block_tokens=block_tokens,
            max_batch_tokens=max_batch_tokens,
            max_batch_sequences=max_batch_sequences,
            prefill_chunk_tokens=prefill_chunk_tokens,
            max_waiting=12,
            micro_batches_per_pipeline=micro_batches,
            min_decode_share=min_decode_share,
            max_held_releases=max_held_releases,
            plans_ahead=plans_ahead,
            pipeline_policy=policy,
            caches_prefixes=self.caches_prefixes,
        )
        self.expected: dict[RequestId, list[int]] = {}
        self.drafter = ErringDrafter(self.expected, most_drafts, draft_rate)
        self.scheduler = Scheduler(self.settings, drafter=self.drafter)
        self.now_s = 0.0
        self.generation = 0
        self.requests: dict[RequestId, GenerationRequest] = {}
        self.tokens: dict[RequestId, list[int]] = {}
        self.finish_reasons: dict[RequestId, FinishReason] = {}
        self.cancelled: set[RequestId] = set()
        self.failed: dict[RequestId, RequestFailure] = {}
        self.stages: dict[PipelineId, SimulatedPipeline] = {}
        self.suspended: dict[PipelineId, tuple[SimulatedPipeline, int]] = {}
        """With their number of blocks."""
        self.former: dict[PipelineId, SimulatedPipeline] = {}
        """Stages that took steps of a pipeline last: they may outlive it."""
        self.num_blocks: dict[PipelineId, int] = {}
        self.in_flight: list[StepPlan] = []
        self.stale: list[StepPlan] = []
        self.open(PIPELINES[0], num_blocks)

    def open(self, pipeline: PipelineId, num_blocks: int) -> None:
        self.drop_in_flight(pipeline)
        self.generation += 1
        self.suspended.pop(pipeline, None)
        self.scheduler.close_pipeline(pipeline, self.now_s)
        generation = Generation(self.generation)
        open_pipeline(
            self.scheduler, pipeline, generation, num_blocks, 2, self.now_s, num_tier_slots=self.num_tier_slots
        )
        self.num_blocks[pipeline] = num_blocks
        self.stages[pipeline] = self.make_stages(pipeline, generation, num_blocks)
        if pipeline in self.former:
            self.stages[pipeline].keep_tables_of(self.former[pipeline])

    def make_stages(self, pipeline: PipelineId, generation: Generation, num_blocks: int) -> SimulatedPipeline:
        return SimulatedPipeline(pipeline, generation, num_blocks, self.settings.block_tokens)

    def computed_by(self, plan: StepPlan) -> ComputedBy:
        """What the stages say of a step that they have answered."""
        return UNKNOWN

    def drop_in_flight(self, pipeline: PipelineId) -> None:
        if pipeline in self.stages:
            self.former[pipeline] = self.stages.pop(pipeline)
        self.stale += [plan for plan in self.in_flight if plan.pipeline == pipeline]
        self.in_flight = [plan for plan in self.in_flight if plan.pipeline != pipeline]

    def deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.finish_reasons, "a token after the last"
            assert output.request_id not in self.cancelled, "a token for nobody"
            assert output.request_id not in self.failed, "a token for a failed request"
            self.tokens[output.request_id].append(output.token.token_id)
            if output.token.finish_reason is not None:
                self.finish_reasons[output.request_id] = output.token.finish_reason

    def count_failures(self, failures: list[RequestFailure]) -> None:
        for failure in failures:
            assert failure.request_id not in self.failed, "a request fails twice"
            self.failed[failure.request_id] = failure

    def send_plans(self) -> None:
        for plan in self.scheduler.schedule(self.now_s):
            assert plan.num_tokens <= self.settings.max_batch_tokens
            assert len(plan.chunks) <= self.settings.max_batch_sequences
            assert plan.chunks or plan.released, "a step does nothing"
            self.stages[plan.pipeline].deliver(plan)
            self.in_flight.append(plan)
        self.count_failures(self.scheduler.pop_failures())

    def answer(self, plan: StepPlan) -> None:
        sampled = self.stages[plan.pipeline].answer(plan)
        self.deliver(self.scheduler.complete(plan.step, sampled, self.now_s, computed_by=self.computed_by(plan)))

    @rule(prompt_length=st.integers(1, 20), max_tokens=st.integers(1, 12), stops=st.booleans())
    def add(self, prompt_length: int, max_tokens: int, stops: bool) -> None:
        number = self.num_requests
        stop_token_ids = frozenset(range(0, 97, 9)) if stops else frozenset()
        request = build_request(
            f"request-{number}", prompt_length, max_tokens, seed=number, stop_token_ids=stop_token_ids
        )
        if number % 3:  # some are choices of one HTTP request
            request = replace(request, group=f"group-{number % 2}")
        self.put_in_line(request)

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def put_in_line(self, request: GenerationRequest) -> None:
        self.expected[request.request_id] = reference_tokens(request)
        try:
            self.scheduler.add(request, self.now_s)
        except (ContextLengthError, OverloadedError):
            return
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = []

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        lives = request_id not in self.finish_reasons.keys() | self.cancelled | self.failed.keys()
        assert self.scheduler.cancel(request_id) == lives
        if lives:
            self.cancelled.add(request_id)

    @precondition(lambda self: self.in_flight)
    @rule()
    def cancel_one_in_flight_and_schedule(self) -> None:
        for chunk in self.in_flight[0].chunks[:1]:
            request_id = RequestId(f"request-{chunk.sampling.seed}")  # the seed is the request's number
            if self.scheduler.cancel(request_id):
                self.cancelled.add(request_id)
        self.send_plans()

    @rule(seconds=st.floats(0.0, 2.0))
    def schedule(self, seconds: float) -> None:
        self.now_s += seconds
        self.send_plans()

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        plan = data.draw(st.sampled_from(self.in_flight))
        plan = self.stages[plan.pipeline].due(plan, self.in_flight)
        self.in_flight.remove(plan)
        self.answer(plan)

    @precondition(lambda self: self.in_flight)
    @rule()
    def complete_all_and_schedule(self) -> None:
        while self.in_flight:
            self.answer(self.in_flight.pop(0))
        self.send_plans()

    @rule()
    def turn_drafts(self) -> None:
        """On or off: wrong ones have left blocks, of which others know nothing."""
        self.drafter.is_on = not self.drafter.is_on

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """The others of its pipeline are void then, and some of its stages may be done with them."""
        plan = data.draw(st.sampled_from(self.in_flight))
        self.scheduler.fail_step(plan.step, ExecutionError("simulated"), self.now_s)
        self.stages[plan.pipeline].drop_steps()
        self.stale += [other for other in self.in_flight if other.pipeline == plan.pipeline]
        self.in_flight = [other for other in self.in_flight if other.pipeline != plan.pipeline]
        self.count_failures(self.scheduler.pop_failures())

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def answer_late(self, data: st.DataObject) -> None:
        plan = data.draw(st.sampled_from(self.stale))
        counted = deepcopy(self.scheduler.counters)
        assert not self.scheduler.complete(plan.step, {}, self.now_s)
        assert self.scheduler.counters == counted

    @rule(pipeline=st.sampled_from(PIPELINES))
    def close(self, pipeline: PipelineId) -> None:
        self.drop_in_flight(pipeline)
        self.suspended.pop(pipeline, None)
        self.scheduler.close_pipeline(pipeline, self.now_s)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        """Any stage is done with any step."""
        plan = data.draw(st.sampled_from(self.in_flight))
        self.stages[plan.pipeline].advance(plan)

    @rule(pipeline=st.sampled_from(PIPELINES))
    def tell_samples(self, pipeline: PipelineId) -> None:
        """What a last stage has sampled reaches the first one, which may have a step that waits for it."""
        if pipeline in self.stages:
            self.stages[pipeline].tell_samples()

    @rule(pipeline=st.sampled_from(PIPELINES), stage=st.integers(0, 1))
    def mirror(self, pipeline: PipelineId, stage: int) -> None:
        if pipeline in self.stages:
            self.stages[pipeline].mirror(stage)

    @rule(pipeline=st.sampled_from(PIPELINES), stage=st.integers(0, 1))
    def join_mirror(self, pipeline: PipelineId, stage: int) -> None:
        if pipeline in self.stages:
            self.stages[pipeline].join_mirror(stage)

    @rule(
        pipeline=st.sampled_from(PIPELINES),
        stage=st.integers(0, 1),
        num_places=st.integers(0, 20),
        num_messages=st.integers(0, 3),
    )
    def fill_mirror(self, pipeline: PipelineId, stage: int, num_places: int, num_messages: int) -> None:
        if pipeline in self.stages:
            self.stages[pipeline].fill_mirror(stage, num_places, num_messages)

    @rule(pipeline=st.sampled_from(PIPELINES))
    def suspend(self, pipeline: PipelineId) -> None:
        stages = self.stages.get(pipeline)
        self.scheduler.suspend_pipeline(pipeline, self.now_s)
        self.drop_in_flight(pipeline)
        if stages is not None:
            self.suspended[pipeline] = stages, self.num_blocks[pipeline]

    @precondition(lambda self: self.suspended)
    @rule(data=st.data(), lost=st.sets(st.integers(0, 1)), mirrored=st.booleans())
    def resume(self, data: st.DataObject, lost: set[int], mirrored: bool) -> None:
        pipeline = data.draw(st.sampled_from(sorted(self.suspended)))
        self.resume_one(pipeline, lost, mirrored)

    def resume_one(self, pipeline: PipelineId, lost: set[int], mirrored: bool) -> None:
        stages, num_blocks = self.suspended.pop(pipeline)
        self.generation += 1
        stages.resume(Generation(self.generation), sorted(lost), mirrored)
        open_pipeline(
            self.scheduler,
            pipeline,
            Generation(self.generation),
            num_blocks,
            2,
            self.now_s,
            kv_marks=stages.marks,
            num_tier_slots=self.num_tier_slots,
            tier_since=stages.tier_since,
        )
        self.stages[pipeline] = stages
        self.send_plans()

    @rule(pipeline=st.sampled_from(PIPELINES), num_blocks=st.integers(2, 14))
    def reopen(self, pipeline: PipelineId, num_blocks: int) -> None:
        assume(len(self.requests) < 40)
        self.open(pipeline, num_blocks)

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_invariants()
        for plan in self.in_flight:
            (step,) = [step for step in self.scheduler.steps_in_flight if step.plan is plan]
            before = self.stages[plan.pipeline].before(plan)
            assert step.overtaken in [other.step for other in before] or (step.overtaken is None and not before)
        for request_id, tokens in self.tokens.items():
            assert tokens == self.expected[request_id][: len(tokens)], "a wrong token"

    def teardown(self) -> None:
        """However it stands now: with a pipeline that holds all, everything ends within a bounded number of steps."""
        if not hasattr(self, "scheduler"):
            return
        for waiting in list(self.suspended):
            self.close(waiting)  # or its requests would wait for it, as they should
        self.open(PIPELINES[0], 32)
        for _ in range(5000):
            if is_idle(self.scheduler):
                break
            self.send_plans()
            assert self.in_flight, "work waits and nothing is sent: a livelock"
            self.answer(self.in_flight.pop(0))
            self.scheduler.check_invariants()
        assert is_idle(self.scheduler)
        self.send_plans()  # releases that are too many to be held
        for request_id, request in self.requests.items():
            if request_id in self.cancelled or request_id in self.failed:
                continue
            expected = self.expected[request_id]
            assert self.tokens[request_id] == expected
            stopped = expected[-1] in request.sampling.stop_token_ids
            assert self.finish_reasons[request_id] == (FinishReason.STOP if stopped else FinishReason.LENGTH)
        seen = self.scheduler.snapshot()
        for each in seen.pipelines:
            assert self.stages[each.pipeline].num_known_sequences <= self.settings.max_held_releases
        assert seen.num_free_blocks == sum(self.num_blocks[each.pipeline] for each in seen.pipelines)
        assert seen.reserved_tokens == 0
        assert not self.drafter.num_remembered


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestScheduler = SchedulerMachine.TestCase
