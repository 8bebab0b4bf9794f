"""A mesh of nodes that see parts of the checkpoint: what is missing is said in words, and comes with who sees it."""

from __future__ import annotations

from common.messages import AssignStage
from common.topology import CheckpointPart, NodeKind
from services.router.mesh.status import describe_mesh
from tests.support.router.fake_mesh import FakeMesh, build_request, reference_tokens, said_to
from tests.support.router.mesh_shapes import EXPERTS

EXPERT = NodeKind.EXPERT


def missing(mesh: FakeMesh) -> tuple[str, ...]:
    for _ in range(3):
        mesh.beat()
        mesh.answer()
        mesh.turn(1.0)
    return mesh.loop.status.readiness.missing


def test_weights_that_no_node_has_are_missing_in_words_until_somebody_comes_who_has_them() -> None:
    mesh = FakeMesh(copies=1)
    first, last = mesh.stages.layers
    mesh.hello("a", part=CheckpointPart(first))
    mesh.hello("b", part=CheckpointPart(first))
    mesh.hello("x", EXPERT, part=CheckpointPart(experts=frozenset({0})))
    assert missing(mesh) == (
        "no expert node has the weights of experts 1, 2",
        f"no pipeline is open (2 of 2 stage nodes; no node has the weights of layers [{last.start}, {last.stop}))",
    )
    mesh.hello("y", EXPERT, part=CheckpointPart(experts=frozenset(range(1, EXPERTS))))
    mesh.hello("c", part=CheckpointPart(last))
    assert missing(mesh) == ()
    assert mesh.loop.status.readiness.ready
    request = build_request("r")
    mesh.loop.submit(request)
    mesh.settle()
    assert mesh.tokens("r") == reference_tokens(request)


def test_a_node_that_takes_a_slot_over_is_one_that_sees_its_layers() -> None:
    mesh = FakeMesh(spares=2)
    first, last = mesh.stages.layers
    mesh.hello("x", EXPERT)
    for name, layers in (("a", first), ("b", last), ("s", first), ("t", last)):
        mesh.hello(name, part=CheckpointPart(layers))
    assert missing(mesh) == ()
    mesh.lose("b")
    sent = mesh.turn() + mesh.turn(0.2)  # its lifeline closes, and does not open again
    assert [message.slot for message in said_to("t", sent) if isinstance(message, AssignStage)] == [1]
    assert not any(isinstance(message, AssignStage) for message in said_to("s", sent))


def test_the_mesh_says_what_each_node_can_load() -> None:
    mesh = FakeMesh()
    first, _ = mesh.stages.layers
    mesh.hello("a", part=CheckpointPart(first))
    mesh.hello("w")
    mesh.hello("x", EXPERT, part=CheckpointPart(experts=frozenset({2, 0})))
    mesh.turn(1.0)
    mesh.turn(1.0)
    described = describe_mesh(mesh.loop.status, mesh.loop.status.readiness)
    assert {own["node"]: own["part"] for own in described["nodes"]} == {
        "a": {"layers": [first.start, first.stop], "experts": []},
        "w": None,
        "x": {"layers": None, "experts": [0, 2]},
    }
