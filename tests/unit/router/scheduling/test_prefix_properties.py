"""Prompts that begin alike, and whatever happens, with steps planned ahead and without: what is found is what was to be
computed; no block is lost."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from common.ids import Generation, PipelineId
from services.router.engine import GenerationRequest
from services.router.scheduling.step_plan import ComputedBy, StepPlan
from tests.support.router.simulated_pipeline import build_request, reference_tokens
from tests.support.router.written_rows import WrittenRows
from tests.unit.router.scheduling.test_scheduler_properties import PIPELINES, SchedulerMachine


class PrefixMachine(SchedulerMachine):
    """The same events, with a cache, requests that begin alike, experts that are lost, classes that change."""

    caches_prefixes = True

    @initialize(degrades=st.booleans())
    def prepare(self, degrades: bool) -> None:
        """It may come after `start`, which has opened the first pipeline."""
        self.degrades = degrades
        for stages in getattr(self, "stages", {}).values():
            stages._degrades = degrades

    def make_stages(self, pipeline: PipelineId, generation: Generation, num_blocks: int) -> WrittenRows:
        size, degrades = self.settings.block_tokens, getattr(self, "degrades", False)
        return WrittenRows(pipeline, generation, num_blocks, size, self.by_seed, degrades=degrades)

    @property
    def by_seed(self) -> list[GenerationRequest]:
        if not hasattr(self, "_by_seed"):
            self._by_seed: list[GenerationRequest] = []
        return self._by_seed

    def computed_by(self, plan: StepPlan) -> ComputedBy:
        stages = self.stages[plan.pipeline]
        assert isinstance(stages, WrittenRows)
        return stages.computed_by(plan)

    @property
    def num_requests(self) -> int:
        return len(self.by_seed)

    def put_in_line(self, request: GenerationRequest) -> None:
        assert request.sampling.seed == len(self.by_seed)
        self.by_seed.append(request)
        super().put_in_line(request)

    @rule(
        shared=st.integers(0, 18),
        own=st.integers(0, 4),
        text=st.integers(0, 1),
        max_tokens=st.integers(1, 8),
        salt=st.sampled_from(["", "", "a"]),
        uses_cache=st.integers(0, 5),
        num_choices=st.integers(1, 3),
        stops=st.booleans(),
    )
    def add_alike(
        self,
        shared: int,
        own: int,
        text: int,
        max_tokens: int,
        salt: str,
        uses_cache: int,
        num_choices: int,
        stops: bool,
    ) -> None:
        """Requests with the beginning of one of two texts, in which a turn of a conversation goes on, too."""
        number = len(self.by_seed)
        prompt = tuple((text * 31 + position * 7) % 97 for position in range(shared))
        prompt += tuple((number * 13 + position) % 97 for position in range(own)) or (5,)
        self.add_choices(prompt, max_tokens, salt, uses_cache > 0, num_choices, stops)

    @precondition(lambda self: self.by_seed)
    @rule(data=st.data(), max_tokens=st.integers(1, 8), own=st.integers(0, 4))
    def add_next_turn(self, data: st.DataObject, max_tokens: int, own: int) -> None:
        """An earlier prompt, the answer to it, and some more."""
        earlier = data.draw(st.sampled_from(self.by_seed[-4:]))
        prompt = (*earlier.prompt_token_ids, *reference_tokens(earlier), *range(own))
        self.add_choices(prompt[:24], max_tokens, earlier.cache_salt, True, 1)

    def add_choices(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        salt: str,
        uses_cache: bool,
        num_choices: int,
        stops: bool = False,
    ) -> None:
        """`stops`: each fourth token ends a choice, so that one in four has a row too many in a step planned ahead."""
        stop_token_ids = frozenset(range(0, 97, 4)) if stops else frozenset()
        for choice in range(num_choices):
            number = len(self.by_seed)
            request = build_request(f"request-{number}", 1, max_tokens, seed=number, stop_token_ids=stop_token_ids)
            request = replace(
                request,
                prompt_token_ids=prompt,
                group=f"alike-{number - choice}",
                cache_salt=salt,
                uses_cache=uses_cache,
            )
            self.put_in_line(request)

    @rule(count=st.integers(1, 6))
    def go_on(self, count: int) -> None:
        """Steps are planned and answered one after another, so that requests come to decode, and the next step of some
        is planned ahead."""
        for _ in range(count):
            self.send_plans()
            if self.in_flight:
                self.answer(self.in_flight.pop(0))
        self.send_plans()

    @rule(pipeline=st.sampled_from(PIPELINES))
    def change_experts(self, pipeline: PipelineId) -> None:
        """Nodes of another class answer from now on."""
        stages = self.stages.get(pipeline)
        if isinstance(stages, WrittenRows):
            stages.expert_class = 3 - stages.expert_class

    @precondition(lambda self: self.suspended)
    @rule(data=st.data(), stage=st.integers(0, 1))
    def replace_by_another_class(self, data: st.DataObject, stage: int) -> None:
        """A slot that has no mirror goes to a process of another class."""
        pipeline = data.draw(st.sampled_from(sorted(self.suspended)))
        stages = self.suspended[pipeline][0]
        assert isinstance(stages, WrittenRows)
        stages.classes[stage] = 3 - stages.classes[stage]
        self.resume_one(pipeline, {stage}, mirrored=False)


PrefixMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPrefixes = PrefixMachine.TestCase
