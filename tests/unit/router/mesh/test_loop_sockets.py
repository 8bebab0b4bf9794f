"""What want of sockets costs a mesh: the newcomer its place for now, and nobody else anything."""

from __future__ import annotations

import pytest

from common.messages import Failed, Welcome
from common.topology import NodeKind
from services.router.control.retelling import RETRY_S
from tests.support.router.fake_mesh import FakeMesh, build_request, kinds, ready_mesh, reference_tokens, said_to


@pytest.fixture
def mesh() -> FakeMesh:
    return ready_mesh()


def test_want_of_sockets_refuses_the_newcomer_and_costs_nobody_else_anything(mesh: FakeMesh) -> None:
    mesh.client.sockets_left = 0
    mesh.hello("y", NodeKind.EXPERT)
    (refusal,) = said_to("y", mesh.turn(0.2))
    assert isinstance(refusal, Failed)
    assert (refusal.code, "too many files" in refusal.message) == ("no_socket", True)
    mesh.loop.submit(build_request("a"))
    mesh.settle()
    assert mesh.tokens("a") == reference_tokens(build_request("a"))
    mesh.client.sockets_left = 1000
    mesh.hello("y", NodeKind.EXPERT)
    assert Welcome in kinds(said_to("y", mesh.turn(0.2)))


@pytest.mark.parametrize("runs", [False, True])
def test_a_pipeline_for_which_there_is_no_socket_is_opened_later(runs: bool) -> None:
    mesh = FakeMesh(spares=1)
    mesh.client.pipeline_sockets_left = 1 if runs else 0
    mesh.start("abc")
    request = build_request("a", max_tokens=20)
    mesh.loop.submit(request)
    if runs:
        mesh.turn()
        mesh.lose("b")
    mesh.settle(3)
    assert not mesh.loop.status.readiness.ready
    assert "too many files" in mesh.loop.status.readiness.detail
    mesh.client.pipeline_sockets_left = 1000
    for _ in range(3):
        mesh.beat()
        mesh.turn(0.6 * RETRY_S)
    mesh.settle(30)
    assert mesh.loop.status.readiness.ready
    assert mesh.tokens("a") == reference_tokens(request)
