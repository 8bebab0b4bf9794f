"""Requests that share blocks, mirrors that take over, routers that end: what they share is right, and is theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ExecutionError
from common.ids import Generation
from services.router.engine import GenerationRequest
from services.router.scheduling.blocks.session_tier import SessionTier
from services.router.scheduling.step_plan import ComputedBy, StepPlan
from tests.chaos.planted_bugs import reuse_tier_slot
from tests.support.router.simulated_pipeline import build_request, reference_tokens
from tests.support.router.written_rows import WrittenRows
from tests.unit.router.scheduling.test_takeover_properties import P0, Mesh

MOVES = st.lists(
    st.tuples(st.sampled_from("wwwwwwwaaaaaassssffffjttrnn"), st.integers(0, 1), st.integers(0, 3), st.integers(0, 3)),
    min_size=20,
    max_size=120,
)
STOPS = st.sampled_from([frozenset(), frozenset(range(0, 97, 5))])
"""Tokens that end a request: each fifth ends one that has a row in the next step already, if that is planned ahead."""


class AlikeMesh(Mesh):
    """Four requests, three of which begin alike for 8, 10 and 14 tokens, in blocks of 4. Later come others, which begin
    like the text of one of them and its answer, up to there or to the middle of it."""

    caches_prefixes = True

    def __init__(
        self, batch_sequences: int = 1, stop_token_ids: frozenset[int] = frozenset(), most_drafts: int = 0
    ) -> None:
        self.stop_token_ids = stop_token_ids
        super().__init__(batch_sequences, most_drafts)

    def make_requests(self) -> list[GenerationRequest]:
        text = tuple(range(14))
        requests: list[GenerationRequest] = []
        for prompt in (text, (*text[:10], 90, 91), (*text[:8], 92), (93, 94, 95)):
            requests.append(self.make_request(len(requests), prompt))
        for earlier in requests[:3]:
            whole = (*earlier.prompt_token_ids, *reference_tokens(earlier))
            for prompt in (whole, (*whole[:-3], 96)):
                requests.append(self.make_request(len(requests), prompt))
        return requests

    def make_request(self, number: int, prompt: tuple[int, ...]) -> GenerationRequest:
        request = build_request(f"r{number}", 1, 12, seed=number, stop_token_ids=self.stop_token_ids)
        return replace(request, prompt_token_ids=prompt)

    def make_stages(self) -> WrittenRows:
        return WrittenRows(P0, Generation(1), self.num_blocks, 4, self.requests)

    def computed_by(self, plan: StepPlan) -> ComputedBy:
        assert isinstance(self.stages, WrittenRows)
        return self.stages.computed_by(plan)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    moves=MOVES,
    batch_sequences=st.sampled_from([1, 2, 4, 4]),
    stop_token_ids=STOPS,
    most_drafts=st.sampled_from([0, 0, 1, 3, 5]),
)
def test_every_token_is_right_whoever_takes_over_or_restarts(
    moves: list[tuple[str, int, int, int]], batch_sequences: int, stop_token_ids: frozenset[int], most_drafts: int
) -> None:
    mesh = AlikeMesh(batch_sequences, stop_token_ids, most_drafts)
    for move in moves:
        mesh.move(*move)
        mesh.scheduler.check_invariants()
    mesh.finish()


def test_what_is_found_was_computed_by_steps_that_were_planned_ahead() -> None:
    mesh = AlikeMesh(batch_sequences=4)
    while mesh.in_flight:
        mesh.answer(mesh.in_flight[0])
    assert mesh.scheduler.snapshot().counters.steps_planned_ahead >= 8
    mesh.finish()
    assert isinstance(mesh.stages, WrittenRows)
    assert mesh.stages.num_found >= 3 * 2 * 20, "prompts and answers, on both slots"


def test_a_restarted_router_shares_the_blocks_that_were_shared() -> None:
    mesh = AlikeMesh()
    while not all(
        mesh.tokens[request.request_id] for request in mesh.requests[:3]
    ):  # the pipeline takes three at a time
        mesh.answer(mesh.in_flight[0])
    before = mesh.scheduler.snapshot()
    assert before.counters.prefixes.blocks_found == 4
    mesh.restart_router([])
    after = mesh.scheduler.snapshot()
    assert after.counters.requests_adopted == 3
    assert after.num_free_blocks == before.num_free_blocks
    mesh.scheduler.check_invariants()
    mesh.finish()


class SmallPoolMesh(AlikeMesh):
    """Three texts in turn, of which the pool holds one and a part of another, and the session tier most of the rest."""

    num_blocks = 9
    num_tier_slots = 10
    num_at_start = 1

    def make_requests(self) -> list[GenerationRequest]:
        texts = [tuple(range(first, first + 26)) for first in (0, 30, 60)]
        prompts = [texts[number % 3][: 26 - number % 5] for number in range(14)]
        made = [self.make_request(number, prompt) for number, prompt in enumerate(prompts)]
        return [replace(each, sampling=replace(each.sampling, max_tokens=5)) for each in made]

    def move(self, kind: str, stage: int, which: int, count: int) -> None:
        if kind == "A":
            for _ in range(4 * count + which):
                self.move("a", stage, 0, 0)
            self.add_next(1)
        elif kind == "x" and self.in_flight:
            self.fail(self.in_flight[which % len(self.in_flight)])
        else:
            super().move(kind, stage, which, count)

    def fail(self, plan: StepPlan) -> None:
        """Its holders stay, and what they have saved."""
        self.scheduler.fail_step(plan.step, ExecutionError("simulated"), 0.0)
        self.scheduler.suspend_pipeline(P0, 0.0)
        self.in_flight.clear()
        self.generation += 1
        self.stages.resume(Generation(self.generation), [], mirrored=False)
        self.open_pipeline(self.generation, self.stages.marks, tier_since=self.stages.tier_since)
        self.send()


TIER_MOVES = st.lists(
    st.tuples(st.sampled_from("AAAAAAAAaawwwffjtrxxn"), st.integers(0, 1), st.integers(0, 3), st.integers(0, 3)),
    min_size=20,
    max_size=60,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    moves=TIER_MOVES,
    batch_sequences=st.sampled_from([1, 2, 4]),
    stop_token_ids=STOPS,
    most_drafts=st.sampled_from([0, 0, 2, 4]),
)
def test_what_comes_back_from_the_session_tier_is_right_whoever_takes_over_or_restarts(
    moves: list[tuple[str, int, int, int]], batch_sequences: int, stop_token_ids: frozenset[int], most_drafts: int
) -> None:
    mesh = SmallPoolMesh(batch_sequences, stop_token_ids, most_drafts)
    for move in moves:
        mesh.move(*move)
        mesh.scheduler.check_invariants()
    mesh.finish()


def test_a_small_pool_gets_back_what_it_had_no_room_for() -> None:
    mesh = SmallPoolMesh()
    mesh.finish()
    assert mesh.scheduler.snapshot().counters.prefixes.tier.blocks_restored >= 20


def test_a_tier_slot_that_is_used_again_while_its_entry_is_found_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SessionTier, "_free_slot", reuse_tier_slot(SessionTier._free_slot))
    mesh = SmallPoolMesh()
    with pytest.raises(AssertionError, match=r"what is there (stood elsewhere|is of another text)"):
        mesh.finish()
