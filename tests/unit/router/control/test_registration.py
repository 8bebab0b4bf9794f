from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from common.errors import CheckpointError, ConfigurationError, NodeLostError, ProtocolError
from common.ids import Incarnation, NodeId
from common.topology import CheckpointPart, LayerRange, NodeDescription, NodeKind
from services.router.control.membership import MAX_REMEMBERED_DEAD, ChangeReason, MembershipChange, NodeState
from services.router.control.registration import DeclaredDead, check_hello, refuse_other_device
from tests.support.router.fake_mesh import hello_of
from tests.support.router.mesh_shapes import EXPERTS, LAYERS, node, small_model

A = NodeId("a")


def registered(described: NodeDescription, **changes: Any) -> NodeDescription:
    return check_hello(replace(hello_of(described), **changes), described.node_id, "print", small_model())


@pytest.mark.parametrize(
    "part",
    [None, CheckpointPart(LayerRange(1, LAYERS)), CheckpointPart(experts=frozenset({0, EXPERTS - 1}))],
    ids=["whole", "layers", "experts"],
)
def test_a_node_is_known_as_it_describes_itself(part: CheckpointPart | None) -> None:
    described = node("a", part=part)
    assert registered(described) == described


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"part_layers": (0, LAYERS + 1)}, "part_layers"),
        ({"part_layers": (2, 2)}, "part_layers"),
        ({"part_layers": (1,)}, "part_layers"),
        ({"part_layers": (0, 1, 2)}, "part_layers"),
        ({"part_experts": (0, EXPERTS)}, "part_experts"),
    ],
    ids=str,
)
def test_a_part_that_this_model_does_not_have_is_refused_by_the_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ProtocolError, match=f"Hello.{named}"):
        registered(node("a"), **changes)


def test_a_part_of_another_checkpoint_is_refused_as_the_whole_of_it_is() -> None:
    with pytest.raises(
        CheckpointError, match=r"checkpoints differ: a sees one with the fingerprint other, the router one with print"
    ):
        registered(node("a", part=CheckpointPart(LayerRange(0, 2))), fingerprint="other")


def test_a_gpu_does_not_join_nodes_of_its_kind_that_compute_on_processors() -> None:
    """Whoever joins may become a copy, a mirror or an heir of one that is there."""
    gpu, processors = node("g", numeric_class="cuda/torch/A"), [node("a"), node("b")]
    with pytest.raises(ConfigurationError, match=r"g computes on cuda, the stage nodes of this mesh on cpu: DEVICE"):
        refuse_other_device(gpu, processors)
    with pytest.raises(ConfigurationError, match=r"a computes on cpu, the stage nodes of this mesh on cuda: DEVICE"):
        refuse_other_device(processors[0], [gpu])


def test_nodes_of_the_other_kind_of_another_gpu_or_of_another_life_are_no_hindrance() -> None:
    gpu = node("g", numeric_class="cuda/torch/A")
    refuse_other_device(gpu, [node("e", NodeKind.EXPERT), node("h", numeric_class="cuda/torch/B"), node("g")])
    refuse_other_device(node("a", numeric_class="cpu/native"), [node("b", numeric_class="cpu/torch")])


def death(node_id: NodeId, reason: ChangeReason) -> MembershipChange:
    return MembershipChange(node_id, Incarnation(1), NodeState.ALIVE, NodeState.DEAD, reason)


def test_who_was_declared_dead_is_told_to_come_back_and_others_are_not() -> None:
    dead = DeclaredDead()
    dead.add(death(A, ChangeReason.SILENT), node("a"))
    for _ in range(2):
        with pytest.raises(NodeLostError, match=r"a was declared dead \(silent\): it must come back as another"):
            dead.refuse(A)
    dead.refuse(NodeId("b"))


def test_who_could_not_be_reached_is_told_where_and_to_end_since_another_incarnation_could_not_be_either() -> None:
    dead = DeclaredDead()
    dead.add(death(A, ChangeReason.UNREACHABLE), node("a"))
    with pytest.raises(ConfigurationError, match="cannot connect to a at tcp://a:2: ADVERTISE_HOST must be"):
        dead.refuse(A)


def test_the_longest_dead_are_forgotten() -> None:
    dead = DeclaredDead()
    for number in range(MAX_REMEMBERED_DEAD + 1):
        dead.add(death(NodeId(f"node-{number}"), ChangeReason.SILENT), None)
    dead.refuse(NodeId("node-0"))
    with pytest.raises(NodeLostError):
        dead.refuse(NodeId("node-1"))
