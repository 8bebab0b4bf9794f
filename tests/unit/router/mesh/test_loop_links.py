"""Nodes count once the links to them stand, and a router counts as long as its nodes have heard of no later one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.errors import FencedError
from common.ids import PipelineId
from common.messages import NO_ARRAY, AssignStage, Failed, Header, Leave, LeaveAcknowledged, StageHeartbeat, Welcome
from common.topology import NodeKind, StageState
from common.wire.array import array_to_frame
from tests.support.router.fake_mesh import (
    TERM,
    FakeMesh,
    build_request,
    hello_of,
    kinds,
    ready_mesh,
    reference_tokens,
    said_to,
)
from tests.support.router.mesh_shapes import EXPERTS, LAYERS, node

IDLE = StageHeartbeat()
FIRST = PipelineId(0)


def test_a_node_that_has_obeyed_a_later_router_ends_this_one() -> None:
    """It would wait for ever: nodes do not listen to a router of a lower term."""
    mesh, heard = FakeMesh(), []

    def outgrow(term: int) -> None:
        heard.append(term)
        if term > TERM:
            raise FencedError(f"nodes have heard a router of term {term}")

    mesh.loop._outgrow = outgrow
    mesh.say("a", replace(hello_of(node("a")), fingerprint="other"), Header(router_term=TERM + 5))
    mesh.turn()
    assert heard == [], "a node of another mesh says nothing of this one"
    mesh.say("a", hello_of(node("a")), Header(router_term=TERM))
    mesh.turn()
    mesh.say("b", hello_of(node("b")), Header(router_term=TERM + 5))
    with pytest.raises(FencedError, match="term 9"):
        mesh.turn()
    assert heard == [TERM, TERM + 5]


def test_a_node_gets_no_role_before_the_link_to_it_stands() -> None:
    """Its name may lead nowhere: whoever counted on it would wait."""
    mesh = FakeMesh()
    mesh.start("a")
    mesh.hello("b")
    (link,) = mesh.client.events
    mesh.client.events.clear()
    assert kinds(said_to("b", mesh.turn())) == [Welcome]
    for _ in range(4):
        mesh.beat()
        assert AssignStage not in kinds(said_to("b", mesh.turn(1.0)))
        assert not mesh.loop.status.readiness.ready
        assert "the router is not connected to b at" in mesh.loop.status.readiness.detail
    mesh.client.events.append(link)
    assert AssignStage in kinds(said_to("b", mesh.turn(0.1)))
    mesh.settle()
    assert mesh.loop.status.readiness.ready


def test_what_a_node_holds_is_left_to_it_until_the_link_to_it_stands() -> None:
    """A restarted router hears of it by heartbeats, too, and must not tell it to forget what it will go on with."""
    mesh = FakeMesh(adopts=True)
    mesh.hello("x", NodeKind.EXPERT)
    mesh.turn()
    mesh.come_back("a", 0, 0, {7: (3, 20)})
    (link,) = mesh.client.events
    mesh.client.events.clear()
    mesh.turn(0.1)
    for _ in range(8):
        mesh.say("a", replace(IDLE, role_state=StageState.HOLDING))
        assert said_to("a", mesh.turn(0.25)) == []
    mesh.client.events.append(link)
    assert said_to("a", mesh.turn(0.25)) != []


def test_a_node_whose_link_never_stands_is_told_so_and_was_never_counted_on() -> None:
    mesh = FakeMesh()
    mesh.start("a")
    mesh.hello("b")
    mesh.client.events.clear()
    for _ in range(11):
        mesh.beat()
        sent = said_to("b", mesh.turn(1.0))
        assert AssignStage not in kinds(sent)
    mesh.beat()
    (refusal,) = [message for message in said_to("b", mesh.turn()) if isinstance(message, Failed)]
    assert "ADVERTISE_HOST" in refusal.message
    mesh.hello("c")
    mesh.settle()
    assert mesh.loop.status.readiness.ready, "another one has its place"


def test_a_pipeline_whose_links_carry_nothing_is_not_ready_however_often_it_is_opened() -> None:
    """The results of its last stage may go to a name that leads nowhere."""
    mesh = FakeMesh()
    for name, kind in (("x", NodeKind.EXPERT), ("a", NodeKind.STAGE), ("b", NodeKind.STAGE)):
        mesh.hello(name, kind)
    for _ in range(40):
        mesh.beat()
        mesh.turn(1.0)  # steps fail by their deadline, and the pipeline begins anew
        assert not mesh.loop.status.readiness.ready
    assert mesh.stages.pipelines[FIRST].generation > 1
    mesh.settle()
    assert mesh.loop.status.readiness.ready


def test_a_node_that_leaves_before_the_link_to_it_stands_may_go_at_once() -> None:
    mesh = FakeMesh()
    mesh.start("a")
    mesh.hello("b")
    mesh.client.events.clear()
    mesh.turn()
    mesh.say("b", Leave("stopped"))
    assert kinds(said_to("b", mesh.turn(0.1))) == [LeaveAcknowledged]


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        (NodeKind.STAGE, {"held_slot": (0, 0, 2)}),
        (NodeKind.STAGE, {"held_slot": (0, 0, 2, 0, 1, 3, 32, 950), "held_blocks": NO_ARRAY}),
        (NodeKind.EXPERT, {"held_shards": array_to_frame(np.zeros((LAYERS, EXPERTS, 1), dtype=np.int32))}),
    ],
)
def test_a_hello_that_claims_what_makes_no_sense_is_refused_and_the_router_goes_on(
    kind: NodeKind, held: dict[str, Any]
) -> None:
    mesh = ready_mesh()
    description = mesh.hello("y", kind)
    mesh.client.inbox.pop()
    mesh.say("y", replace(hello_of(description), **held))
    (refusal,) = said_to("y", [*mesh.turn(0.2), *mesh.turn(0.2)])
    assert isinstance(refusal, Failed)
    assert "Hello.held_" in refusal.message
    mesh.loop.submit(build_request("a"))
    mesh.settle()
    assert mesh.tokens("a") == reference_tokens(build_request("a"))
