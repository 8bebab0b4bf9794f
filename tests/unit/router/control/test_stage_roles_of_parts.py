"""Slots, mirrors and adoption where stage nodes see some layers only."""

from __future__ import annotations

import pytest

from common.ids import LeaseTerm, NodeId, PipelineId, SlotIndex
from common.messages import Unassign
from common.topology import CheckpointPart, LayerRange, NodeDescription, StageSlot
from services.router.control.actions import OpenPipeline, SuspendPipeline, Tell
from services.router.control.adoption import ADOPT_S, HeldSlot
from services.router.control.stage_roles import StageRoles
from tests.support.router.mesh_shapes import LAYERS, node
from tests.support.router.stage_reports import mirror_of, mirrored, report, roles_of, told

FIRST, LAST = roles_of().layers


def seeing(name: str, layers: LayerRange | None) -> NodeDescription:
    return node(name, part=CheckpointPart(layers))


def opened(roles: StageRoles, *nodes: NodeDescription) -> None:
    for description in nodes:
        report(roles, roles.join(description))


def test_a_node_is_told_the_slot_whose_layers_it_sees() -> None:
    roles = roles_of()
    roles.join(seeing("a", LAST))
    assignments = told(roles.join(seeing("b", FIRST)))
    assert {name: message.slot for name, (message, _) in assignments.items()} == {"a": 1, "b": 0}


def test_a_part_that_was_cut_for_fewer_slots_serves_all_slots_that_lie_in_it() -> None:
    roles = roles_of(pp=LAYERS)
    opened(roles, *(seeing(name, LayerRange(0, LAYERS - 1)) for name in "abc"))
    assert roles.num_open == 0
    assert roles.detail == f"3 of {LAYERS} stage nodes"
    opened(roles, seeing("d", LayerRange(LAYERS - 1, LAYERS)))
    assert roles.num_open == 1
    assert roles.slot_of(NodeId("d")) == StageSlot(PipelineId(0), SlotIndex(LAYERS - 1))


@pytest.mark.parametrize("layers", [FIRST, None], ids=["other-layers", "no-layers"])
def test_layers_that_nobody_has_are_named(layers: LayerRange | None) -> None:
    roles = roles_of()
    roles.join(seeing("a", FIRST))
    assert roles.join(seeing("b", layers)) == []
    assert roles.detail == f"2 of 2 stage nodes; no node has the weights of layers [{LAST.start}, {LAST.stop})"


def test_a_hole_that_no_spare_can_fill_is_named_by_its_layers() -> None:
    roles = roles_of(spares=1)
    opened(roles, seeing("a", FIRST), seeing("b", LAST), seeing("c", FIRST))
    assert roles.lose(NodeId("b")) == [SuspendPipeline(PipelineId(0))]
    assert roles.detail == (
        "2 of 2 stage nodes; no node holds slot 1 of pipeline 0; "
        f"no node has the weights of layers [{LAST.start}, {LAST.stop})"
    )
    opened(roles, node("d"))
    assert roles.num_open == 1


def test_who_has_the_weights_and_another_slot_is_told_apart_from_nobody() -> None:
    roles = roles_of(pp=3)
    opened(roles, seeing("a", LayerRange(0, 1)), seeing("b", LayerRange(0, 1)), node("c"))
    assert "no other node has the weights of layers [3, 4)" in roles.detail


def test_a_spare_mirrors_only_a_slot_whose_layers_it_sees() -> None:
    roles = roles_of(spares=1)
    opened(roles, seeing("a", FIRST), seeing("b", LAST))
    actions = roles.join(seeing("c", LAST))
    assert {name: message.slot for name, message in mirror_of(actions).items()} == {"c": 1}
    mirrored(roles, actions)
    assert told(roles.lose(NodeId("b")))["c"][0].slot == 1


def test_who_sees_everything_mirrors_the_slot_that_no_other_spare_sees() -> None:
    roles = roles_of(spares=2)
    roles.join(seeing("a", FIRST))
    begun = roles.join(seeing("b", LAST))
    roles.join(node("w"))
    roles.join(seeing("s", FIRST))
    opening = report(roles, begun)
    assert {name: message.slot for name, message in mirror_of(opening).items()} == {"s": 0, "w": 1}


def test_a_holder_stays_where_it_has_no_room_for_the_slot_that_it_would_change_to() -> None:
    """A block of the first slot is larger, by the activation log."""
    roles = roles_of()
    opened(roles, seeing("a", FIRST), node("small", capacity_bytes=165_000))
    assert roles.num_open == 1
    roles.lose(NodeId("a"))
    assert told(roles.join(seeing("c", LAST))) == {}
    assert "small: stage slot 0 needs" in roles.detail
    assert roles.slot_of(NodeId("small")) == StageSlot(PipelineId(0), SlotIndex(1))
    opened(roles, seeing("d", FIRST))
    assert roles.num_open == 1


def held(index: int, roles: StageRoles) -> HeldSlot:
    return HeldSlot(0, index, 2, roles.layers[index], 5, 32, 900)


def test_a_restarted_router_gives_no_slot_back_to_who_could_not_load_it_again() -> None:
    roles = roles_of(adopts=True, spares=1)
    roles.join(node("s"), 0.0)
    roles.join(seeing("a", FIRST), 0.0, held(0, roles))
    (forget,) = roles.join(seeing("b", FIRST), 0.0, held(1, roles))
    assert isinstance(forget, Tell)
    assert (forget.node_id, forget.message) == ("b", Unassign(LeaseTerm(5)))
    actions = roles.tick(ADOPT_S)
    assert {name: message.slot for name, (message, _) in told(actions).items()} == {"a": 0, "s": 1}


def test_a_restarted_router_gives_slots_back_to_nodes_with_parts_as_to_others() -> None:
    roles = roles_of(adopts=True)
    roles.join(seeing("b", LAST), 0.0, held(1, roles))
    actions = roles.join(seeing("a", FIRST), 0.0, held(0, roles))
    assert {name: message.slot for name, (message, _) in told(actions).items()} == {"a": 0, "b": 1}
    assert isinstance(report(roles, actions)[0], OpenPipeline)
