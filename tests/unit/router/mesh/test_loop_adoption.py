"""The mesh thread after a restart of the router: requests find the pipeline that has their cache."""

from __future__ import annotations

import pytest

from common.ids import PipelineId, SequenceId
from common.topology import NodeKind
from services.router.control.adoption import ADOPT_S, NEW_S
from tests.support.router.fake_mesh import FakeMesh, build_request, reference_tokens


@pytest.mark.parametrize("delay_s", [0.0, 0.03, 1.0], ids="{} s later".format)
def test_each_request_goes_on_where_its_cache_is_also_if_another_pipeline_is_back_first(delay_s: float) -> None:
    mesh = FakeMesh(adopts=True)
    for name, sequence_id in (("r", 7), ("q", 8)):
        request = build_request(name, prompt_length=5, max_tokens=6)
        tokens = reference_tokens(request)[:4]
        mesh.loop.submit(request.restored(tokens, SequenceId(sequence_id)))
        mesh.client.held[8 - sequence_id] = {sequence_id: [*request.prompt_token_ids, *tokens][:8]}
    mesh.hello("x", NodeKind.EXPERT)
    for slot, name in enumerate("ab"):
        mesh.come_back(name, 0, slot, {8: (0, 8)})
    mesh.turn()
    mesh.turn(delay_s)
    for slot, name in ((1, "d"), (0, "c")):
        mesh.come_back(name, 1, slot, {7: (0, 8)})
    mesh.turn()
    mesh.turn()
    assert mesh.scheduler.counters.requests_adopted == 2
    assert [pipeline.holders for pipeline in mesh.stages.pipelines.values()] == [("a", "b"), ("c", "d")]
    caches = {pipeline: list(stages.cache) for pipeline, stages in mesh.client.pipelines.items()}
    assert caches == {PipelineId(0): [8], PipelineId(1): [7]}
    mesh.settle()
    for name in "rq":
        assert mesh.tokens(name) == reference_tokens(build_request(name, prompt_length=5, max_tokens=6))[4:]
    assert mesh.scheduler.counters.tokens_replayed == 0


def test_a_request_whose_cache_does_not_come_back_is_computed_again_where_there_is_room() -> None:
    mesh = FakeMesh(adopts=True)
    request = build_request("r", prompt_length=5, max_tokens=6)
    mesh.loop.submit(request.restored(reference_tokens(request)[:4], SequenceId(7)))
    mesh.hello("x", NodeKind.EXPERT)
    for slot, name in enumerate("ab"):
        mesh.come_back(name, 0, slot, {})
    mesh.turn()
    mesh.turn(0.2)
    assert mesh.stages.num_open == 1
    assert mesh.scheduler.snapshot().num_waiting == 1
    mesh.turn(ADOPT_S)
    assert mesh.scheduler.snapshot().num_waiting == 0
    mesh.settle()
    assert mesh.tokens("r") == reference_tokens(request)[4:]


def test_a_mesh_that_was_started_anew_as_a_whole_opens_without_waiting_for_former_holders() -> None:
    mesh = FakeMesh(adopts=True)
    mesh.hello("x", NodeKind.EXPERT)
    for name in "ab":
        mesh.hello(name)
    mesh.turn()
    mesh.turn(NEW_S - 0.05)
    assert mesh.stages.num_open == 0
    mesh.turn(0.1)
    mesh.turn(0.05)
    mesh.turn(0.05)
    assert mesh.stages.num_open == 1
