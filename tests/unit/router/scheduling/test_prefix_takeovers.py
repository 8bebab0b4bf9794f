"""Requests that share blocks, mirrors that take over, routers that end: what they share is right, and is theirs."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings

from common.ids import Generation
from services.router.engine import GenerationRequest
from services.router.scheduling.step_plan import ComputedBy, StepPlan
from tests.support.router.simulated_pipeline import build_request
from tests.support.router.written_rows import WrittenRows
from tests.unit.router.scheduling.test_takeover_properties import MOVES, NUM_BLOCKS, P0, Mesh


class AlikeMesh(Mesh):
    """Four requests, three of which begin alike for 8, 10 and 14 tokens, in blocks of 4."""

    caches_prefixes = True

    def make_requests(self) -> list[GenerationRequest]:
        text = tuple(range(14))
        prompts = (text, (*text[:10], 90, 91), (*text[:8], 92), (93, 94, 95))
        return [
            replace(build_request(f"r{n}", 1, 12, seed=n), prompt_token_ids=prompt) for n, prompt in enumerate(prompts)
        ]

    def make_stages(self) -> WrittenRows:
        return WrittenRows(P0, Generation(1), NUM_BLOCKS, 4, self.requests)

    def computed_by(self, plan: StepPlan) -> ComputedBy:
        assert isinstance(self.stages, WrittenRows)
        return self.stages.computed_by(plan)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(MOVES)
def test_every_token_is_right_whoever_takes_over_or_restarts(moves: list[tuple[str, int, int, int]]) -> None:
    mesh = AlikeMesh()
    for move in moves:
        mesh.move(*move)
        mesh.scheduler.check_invariants()
    mesh.finish()


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
