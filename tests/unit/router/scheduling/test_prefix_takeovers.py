"""Requests that share blocks, mirrors that take over, routers that end: what they share is right, and is theirs."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.ids import Generation
from services.router.engine import GenerationRequest
from services.router.scheduling.step_plan import ComputedBy, StepPlan
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
    """Blocks of the longest request and hardly more: what nobody holds makes room, and comes back."""

    num_blocks = 12
    num_tier_slots = 20


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(moves=MOVES, batch_sequences=st.sampled_from([1, 2, 4]), stop_token_ids=STOPS)
def test_what_comes_back_from_the_session_tier_is_right_whoever_takes_over_or_restarts(
    moves: list[tuple[str, int, int, int]], batch_sequences: int, stop_token_ids: frozenset[int]
) -> None:
    mesh = SmallPoolMesh(batch_sequences, stop_token_ids)
    for move in moves:
        mesh.move(*move)
        mesh.scheduler.check_invariants()
    mesh.finish()


def test_a_small_pool_gets_back_what_it_had_no_room_for() -> None:
    mesh = SmallPoolMesh()
    mesh.finish()
    assert mesh.scheduler.snapshot().counters.prefixes.tier.blocks_restored >= 5
