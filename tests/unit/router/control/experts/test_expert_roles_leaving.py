"""Expert nodes that want to stop, and how urgent it is what they leave behind."""

from __future__ import annotations

from common.ids import NodeId
from common.messages import AssignShards
from common.topology import ShardId
from common.wire.array import frame_to_array
from services.router.control.actions import Tell
from services.router.control.experts.expert_roles import DRAIN_QUIET_S
from tests.support.router.expert_shards import ALL, expert, published, ready_roles, roles_of, settle, told
from tests.support.router.mesh_shapes import EXPERTS, LAYERS


def test_what_a_leaving_node_holds_alone_is_loaded_elsewhere_while_it_is_still_asked() -> None:
    roles = ready_roles("ab", copies=1)
    before = published(roles)
    alone = {shard for shard, owners in before.items() if owners == ["a"]}
    wanted = told(roles.drain(NodeId("a"), 1.0))
    assert wanted == {"b": ALL}, "the leaving node is told nothing: it keeps what it has"
    assert published(roles) == before
    assert roles.may_go(2.0) == []
    roles.apply_report(NodeId("b"), ALL)
    assert roles.has_news
    assert published(roles) == {shard: ["b"] for shard in ALL}
    assert roles.is_served
    assert alone
    assert roles.may_go(3.0) == []
    assert roles.may_go(3.0 + DRAIN_QUIET_S) == ["a"]
    roles.lose(NodeId("a"), 4.0)
    assert roles.may_go(9.0) == []


def test_a_leaving_nodes_copies_are_made_anew_elsewhere_before_it_goes() -> None:
    roles = ready_roles("abc", copies=2)
    settle(roles, roles.drain(NodeId("a"), 1.0))
    assert all(sorted(owners) == ["b", "c"] for owners in published(roles).values())


def test_where_others_hold_everything_a_node_leaves_without_a_wait() -> None:
    roles = ready_roles("ab", copies=2)
    assert told(roles.drain(NodeId("a"), 1.0)) == {}
    assert published(roles) == {shard: ["b"] for shard in ALL}
    roles.may_go(1.0)
    assert roles.may_go(1.0 + DRAIN_QUIET_S) == ["a"]


def test_the_last_node_and_one_whose_shards_have_no_room_elsewhere_go_at_once() -> None:
    roles = ready_roles("a", copies=1)
    roles.drain(NodeId("a"), 1.0)
    assert roles.may_go(1.0) == ["a"]
    roles = roles_of(copies=1)
    actions = [*roles.join(expert("a", 6), 0.0), *roles.join(expert("b", 6), 0.0)]
    settle(roles, actions)
    roles.drain(NodeId("a"), 1.0)
    assert roles.may_go(1.0) == ["a"]


def test_all_that_leave_together_are_let_go_at_once() -> None:
    roles = ready_roles("ab", copies=1)
    roles.drain(NodeId("a"), 1.0)
    roles.drain(NodeId("b"), 1.0)
    assert roles.may_go(1.0) == ["a", "b"]


def test_a_node_that_joins_meanwhile_takes_over() -> None:
    roles = ready_roles("ab", copies=1)
    roles.drain(NodeId("a"), 1.0)
    settle(roles, roles.join(expert("c"), 1.5))
    owners = published(roles)
    assert {name for names in owners.values() for name in names} == {"b", "c"}


def test_shards_that_nobody_serves_are_marked_as_urgent() -> None:
    roles = ready_roles("ab", copies=1)
    lost = {shard for shard, owners in published(roles).items() if owners == ["a"]}
    (action,) = roles.lose(NodeId("a"), 1.0)
    assert isinstance(action, Tell)
    assert isinstance(action.message, AssignShards)
    bitmap = frame_to_array(action.message.shards, "uint8", (LAYERS, EXPERTS, None), "shards")
    assert {ShardId(*map(int, place)) for place in zip(*(bitmap == 2).nonzero(), strict=True)} == lost
