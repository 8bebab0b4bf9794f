from __future__ import annotations

import pytest

from common.errors import ConfigurationError, NodeLostError
from common.ids import Incarnation, NodeId
from common.membership import MAX_REMEMBERED_DEAD, ChangeReason, MembershipChange, NodeState
from services.router.registration import DeclaredDead
from tests.support.mesh_shapes import node

A = NodeId("a")


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
