"""Who holds which shards, as expert nodes come, load, report, reconnect and go."""

from __future__ import annotations

from common.ids import Incarnation, NodeId
from common.messages import PublishPlacement
from common.topology import ShardId
from services.router.control.actions import Action, Tell
from services.router.control.experts.expert_roles import (
    DRAIN_DEADLINE_S,
    DRAIN_QUIET_S,
    REPORT_INTERVAL_S,
    SETTLE_S,
    Leaving,
)
from tests.support.router.expert_shards import (
    ALL,
    PromptRoles,
    expert,
    published,
    ready_roles,
    roles_of,
    row_of,
    seeing,
    settle,
    told,
)
from tests.support.router.mesh_shapes import LAYERS

A, B, D = NodeId("a"), NodeId("b"), NodeId("d")


def test_the_first_placement_waits_for_the_nodes_that_are_expected() -> None:
    roles = roles_of(num_expected=2)
    assert roles.join(expert("a"), 0.0) == []
    assert roles.detail == "1 of 2 expert nodes"
    wanted = told(roles.join(expert("b"), 0.1))
    assert wanted == {"a": ALL, "b": ALL}
    assert not roles.is_served
    assert roles.detail == "0 of 12 expert shards loaded"


def test_it_does_not_wait_for_ever() -> None:
    roles = roles_of(num_expected=3)
    roles.join(expert("a"), 5.0)
    assert roles.tick(5.0 + 0.9 * SETTLE_S) == []
    assert told(roles.tick(5.0 + SETTLE_S)) == {"a": ALL}
    assert roles.tick(99.0) == []


def test_it_is_served_once_every_shard_is_loaded_somewhere() -> None:
    roles = roles_of(copies=1)
    roles.join(expert("a"), 0.0)
    wanted = told(roles.join(expert("b"), 0.0))
    assert wanted["a"] | wanted["b"] == ALL
    assert not wanted["a"] & wanted["b"]
    roles.apply_report(NodeId("a"), wanted["a"])
    assert not roles.is_served
    assert published(roles) == {shard: ["a"] if shard in wanted["a"] else [] for shard in ALL}
    roles.apply_report(NodeId("b"), wanted["b"])
    assert roles.is_served
    assert roles.detail == "12 of 12 expert shards loaded"


def test_stages_are_told_when_something_changed_and_not_otherwise() -> None:
    roles = roles_of(num_expected=1)
    assert not roles.has_news
    settle(roles, roles.join(expert("a"), 0.0))
    assert roles.has_news
    (action,) = roles.pop_news([NodeId("s")])
    assert isinstance(action, Tell)
    assert isinstance(action.message, PublishPlacement)
    assert action.message.version == roles.version
    assert not roles.has_news
    roles.apply_report(NodeId("a"), ALL)
    assert not roles.has_news
    version = roles.version
    settle(roles, roles.join(expert("b"), 0.0))
    assert roles.has_news
    assert roles.version > version


def test_a_lost_nodes_shards_go_to_the_survivors_and_are_served_meanwhile_by_copies() -> None:
    roles = roles_of(num_expected=3)
    actions: list[Action] = []
    for name in "abc":
        actions += roles.join(expert(name), 0.0)
    settle(roles, actions)
    actions = roles.lose(NodeId("a"), 1.0)
    assert roles.is_served
    assert told(actions).keys() <= {"b", "c"}
    assert all("a" not in owners for owners in published(roles).values())
    settle(roles, actions)
    assert {len(owners) for owners in published(roles).values()} == {2}


def test_without_a_copy_it_is_not_served_until_a_survivor_has_loaded_it() -> None:
    roles = roles_of(copies=1)
    roles.join(expert("a"), 0.0)
    settle(roles, roles.join(expert("b"), 0.0))
    actions = roles.lose(NodeId("a"), 1.0)
    assert not roles.is_served
    settle(roles, actions)
    assert roles.is_served
    assert told(roles.lose(NodeId("nobody"), 2.0)) == {}


def test_too_little_room_is_a_sentence_and_what_is_there_goes_on_being_served() -> None:
    roles = roles_of()
    roles.join(expert("a", 6), 0.0)
    settle(roles, roles.join(expert("b", 6), 0.0))
    assert roles.is_served
    assert roles.missing_copies == len(ALL)
    roles.lose(NodeId("b"), 1.0)
    assert "bytes are missing" in roles.detail
    assert not roles.is_served
    assert sum(len(owners) for owners in published(roles).values()) == 6
    settle(roles, roles.join(expert("c"), 2.0))
    assert roles.problem == ""
    assert roles.is_served


def test_a_node_that_reconnects_is_told_anew_and_keeps_serving_what_it_holds() -> None:
    """Its link broke, not its memory: it is the same incarnation."""
    roles = roles_of(num_expected=1, copies=1)
    settle(roles, roles.join(expert("a"), 0.0))
    actions = roles.join(expert("a"), 1.0)
    assert told(actions) == {"a": ALL}
    assert roles.is_served
    assert published(roles) == {shard: ["a"] for shard in ALL}


def test_a_reconnection_moves_no_shard() -> None:
    roles = roles_of(num_expected=3, copies=1)
    actions: list[Action] = []
    for name in "abc":
        actions += roles.join(expert(name), 0.0)
    settle(roles, actions)
    before = published(roles)
    settle(roles, roles.join(expert("b"), 1.0))
    assert published(roles) == before


def test_reports_of_strangers_change_nothing() -> None:
    roles = roles_of(num_expected=1)
    settle(roles, roles.join(expert("a"), 0.0))
    assert roles.apply_report(NodeId("z"), ALL) == []
    assert all(owners == ["a"] for owners in published(roles).values())


# ---- what a node was told to unload
def with_one_shard_on_two_nodes() -> tuple[PromptRoles, ShardId]:
    """`b` and `d` hold it; `b` has room for two, and `d` for all."""
    roles = roles_of(copies=2)
    roles.join(expert("d", len(ALL)), 0.0)
    shard = min(told(roles.join(expert("b", 2), 0.0))["b"])
    for node_id in (B, D):
        roles.apply_report(node_id, frozenset({shard}))
    assert sorted(published(roles)[shard]) == ["b", "d"]
    return roles, shard


def test_a_node_that_is_to_hold_again_what_it_unloaded_is_not_asked_for_it_before_it_has_it_again() -> None:
    roles, shard = with_one_shard_on_two_nodes()
    assert shard not in told(roles.join(expert("a", len(ALL) - 1), 0.0))["b"], "it makes room; d keeps this one"
    assert shard in told(roles.lose(D, 0.0))["b"]
    assert published(roles)[shard] == []
    roles.apply_report(B, frozenset({shard}))
    assert published(roles)[shard] == ["b"]


def test_a_report_that_was_under_way_when_the_node_was_told_to_unload_says_nothing() -> None:
    roles, shard = with_one_shard_on_two_nodes()
    version = roles.versions[B]
    roles.join(expert("a", len(ALL) - 1), 0.0)
    roles.apply_report(B, frozenset({shard}), version)
    roles.lose(D, 0.0)
    roles.apply_report(B, frozenset({shard}), version)
    assert published(roles)[shard] == []


# ---- nodes that see a part of the checkpoint
def test_a_node_is_told_to_hold_only_experts_whose_weights_it_sees() -> None:
    roles = roles_of(num_expected=3)
    actions = [roles.join(seeing(*own), 0.0) for own in (("a", 0, 1), ("b", 1, 2), ("c", 0, 2))]
    wanted = told(actions[-1])
    assert {name: {shard.expert for shard in shards} for name, shards in wanted.items()} == {
        "a": {0, 1},
        "b": {1, 2},
        "c": {0, 2},
    }
    settle(roles, actions[-1])
    assert (roles.is_served, roles.missing_copies) == (True, 0)


def test_experts_that_nobody_sees_are_named_and_all_others_are_loaded_meanwhile() -> None:
    roles = roles_of()
    roles.join(seeing("a", 0), 0.0)
    actions = roles.join(seeing("b", 0), 0.0)
    assert {shard.expert for shard in told(actions)["a"]} == {0}
    settle(roles, actions)
    assert not roles.is_served
    assert roles.detail == "no expert node has the weights of experts 1, 2"
    assert roles.missing_copies == 2 * 2 * LAYERS
    settle(roles, roles.join(seeing("c", 1, 2), 1.0))
    assert roles.is_served
    assert (roles.problem, roles.missing_copies) == ("", 2 * LAYERS)


def test_where_a_lost_node_alone_saw_an_expert_the_others_go_on_being_served() -> None:
    roles = roles_of()
    roles.join(seeing("a", 0, 1), 0.0)
    settle(roles, roles.join(seeing("b", 1, 2), 0.0))
    settle(roles, roles.lose(NodeId("b"), 1.0))
    assert roles.detail == "no expert node has the weights of expert 2"
    assert {shard.expert for shard, owners in published(roles).items() if owners} == {0, 1}
    settle(roles, roles.join(seeing("b2", 2), 2.0))
    assert roles.is_served


def test_a_leaving_node_is_asked_for_what_it_alone_sees_and_not_waited_for() -> None:
    roles = roles_of(copies=1)
    roles.join(seeing("a", 0, 1), 0.0)
    settle(roles, roles.join(seeing("b", 1, 2), 0.0))
    settle(roles, roles.drain(NodeId("b"), 1.0))
    owners = published(roles)
    assert {shard.expert for shard, named in owners.items() if named == ["b"]} == {2}
    assert {shard.expert for shard, named in owners.items() if named == ["a"]} == {0, 1}
    roles.may_go(1.0)
    assert roles.may_go(1.0 + DRAIN_QUIET_S) == ["b"]


# ---- placements that take their time
def test_a_loss_is_answered_before_a_new_placement_has_come() -> None:
    roles = roles_of(num_expected=3)
    actions: list[Action] = []
    for name in "abc":
        actions += roles.join(expert(name), 0.0)
    settle(roles, actions)
    roles.is_prompt = False
    assert told(roles.lose(NodeId("a"), 1.0)) == {}, "nobody loads or unloads anything yet"
    assert roles.is_served
    assert roles.has_news
    assert all("a" not in owners for owners in published(roles).values())
    settle(roles, roles.deliver())
    assert {len(owners) for owners in published(roles).values()} == {2}


def test_a_placement_that_is_out_of_date_is_passed_over_and_asked_for_anew() -> None:
    roles = roles_of(num_expected=1)
    settle(roles, roles.join(expert("a"), 0.0))
    roles.is_prompt = False
    roles.join(expert("b"), 1.0)
    roles.lose(NodeId("b"), 1.1)
    assert roles.deliver() == []
    roles.tick(1.2)
    assert len(roles.requests) == 1
    assert [node.node_id for node in roles.requests[0].nodes] == ["a"]


def test_where_nodes_come_and_go_all_the_time_a_placement_that_is_out_of_date_is_taken_at_last() -> None:
    roles = roles_of(num_expected=1)
    settle(roles, roles.join(expert("a"), 0.0))
    roles.is_prompt = False
    roles.join(expert("b"), 1.0)
    loads_of_b: list[bool] = []
    for number in range(6):
        roles.join(expert(f"c{number}"), 2.0 + number)
        loads_of_b.append("b" in told(roles.deliver()))
        roles.tick(2.5 + number)
    assert any(loads_of_b)


def test_what_nodes_bring_is_served_before_the_first_placement_of_a_new_router_has_come() -> None:
    roles = roles_of(num_expected=1)
    roles.is_prompt = False
    roles.join(expert("a"), 0.0, held=ALL)
    assert roles.is_served
    assert published(roles) == {shard: ["a"] for shard in ALL}


def test_reports_that_come_close_together_are_answered_together() -> None:
    roles = roles_of(num_expected=1, copies=1)
    wanted = told(roles.join(expert("a"), 1.0))["a"]
    for count in range(1, len(wanted) + 1):
        roles.state.apply_report(A, row_of(sorted(wanted)[:count]), roles.versions[A], count)
        assert roles.tick(1.0 + REPORT_INTERVAL_S / 2) == []
    assert not roles.is_served
    roles.tick(1.0 + 2 * REPORT_INTERVAL_S)
    assert roles.is_served


def test_a_node_that_comes_back_with_its_shards_unloads_nothing_before_the_placement_that_counts_it_has_come() -> None:
    roles = roles_of(num_expected=2)
    roles.join(expert("a"), 0.0)
    settle(roles, roles.join(expert("b"), 0.0))
    settle(roles, roles.lose(NodeId("a"), 1.0))
    roles.is_prompt = False
    wanted = told(roles.join(expert("a", incarnation=Incarnation(99)), 2.0, held=ALL))
    assert wanted == {"a": ALL}
    assert told(roles.deliver()) == {}
    assert {len(owners) for owners in published(roles).values()} == {2}


def test_it_stays_as_long_as_it_is_asked_and_goes_a_moment_after() -> None:
    leaving = Leaving(10.0)
    assert not leaving.may_go(True, 11.0)
    assert not leaving.may_go(False, 12.0), "its last calls are under way"
    assert leaving.may_go(False, 12.0 + DRAIN_QUIET_S)


def test_one_that_is_asked_again_waits_again() -> None:
    leaving = Leaving(10.0)
    leaving.may_go(False, 11.0)
    assert not leaving.may_go(True, 11.1)
    assert not leaving.may_go(False, 11.0 + DRAIN_QUIET_S)


def test_the_wait_has_an_end_and_asking_again_does_not_move_it() -> None:
    roles = ready_roles("ab", copies=1)
    roles.drain(A, 10.0)
    roles.drain(A, 10.0 + DRAIN_DEADLINE_S / 2)
    assert roles.may_go(10.0 + 0.99 * DRAIN_DEADLINE_S) == []
    assert roles.may_go(10.0 + DRAIN_DEADLINE_S) == [A]
