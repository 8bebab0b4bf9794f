"""Who holds which shards, as expert nodes come, load, report, reconnect and go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from common.array import frame_to_array
from common.ids import NodeId
from common.messages import AssignShards, PublishPlacement
from common.topology import CheckpointPart, NodeDescription, NodeKind, ShardId
from services.router.control.actions import Action, Tell
from services.router.control.draining import DRAIN_QUIET_S
from services.router.control.expert_roles import SETTLE_S, ExpertRoles
from tests.support.mesh_shapes import EXPERTS, LAYERS, PLENTY, SHARD_BYTES, node, small_mesh, small_model

ALL = frozenset(ShardId(layer, expert, 0) for layer in range(LAYERS) for expert in range(EXPERTS))


def expert(name: str, shards: int | None = None, **changes: Any) -> NodeDescription:
    """A node with room for so many shards (None: for all)."""
    return node(name, NodeKind.EXPERT, PLENTY if shards is None else shards * SHARD_BYTES, **changes)


def roles_of(num_expected: int = 2, **mesh: Any) -> ExpertRoles:
    return ExpertRoles(small_model(), small_mesh(**mesh), num_expected)


def told(actions: Iterable[Action]) -> dict[str, frozenset[ShardId]]:
    """What each node is to hold, by the last word."""
    shards: dict[str, frozenset[ShardId]] = {}
    for action in actions:
        if isinstance(action, Tell) and isinstance(action.message, AssignShards):
            bitmap = frame_to_array(action.message.shards, "uint8", (LAYERS, EXPERTS, None), "shards")
            shards[action.node_id] = frozenset(ShardId(*place) for place in zip(*bitmap.nonzero(), strict=True))
    return shards


def published(roles: ExpertRoles) -> dict[ShardId, list[str]]:
    """Who may be asked for each shard, first choice first, as a stage reads it."""
    actions = roles.publish_to([NodeId("stage")])
    if not actions:
        return {}
    (action,) = actions
    assert isinstance(action, Tell)
    message = action.message
    assert isinstance(message, PublishPlacement)
    copies = frame_to_array(message.copies, "uint8", (len(message.node_ids), LAYERS, EXPERTS, None), "copies")
    owners: dict[ShardId, list[tuple[int, str]]] = {shard: [] for shard in ALL}
    for number, layer, index, piece in zip(*copies.nonzero(), strict=True):
        place = int(copies[number, layer, index, piece])
        owners[ShardId(int(layer), int(index), int(piece))].append((place, message.node_ids[number]))
    return {shard: [name for _, name in sorted(named)] for shard, named in owners.items()}


def settle(roles: ExpertRoles, actions: list[Action]) -> None:
    """All nodes load what they are told and say so, until nobody is told anything."""
    while wanted := told(actions):
        actions = [action for name, held in wanted.items() for action in roles.take_report(NodeId(name), held)]


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
    roles.take_report(NodeId("a"), wanted["a"])
    assert not roles.is_served
    assert published(roles) == {shard: ["a"] if shard in wanted["a"] else [] for shard in ALL}
    roles.take_report(NodeId("b"), wanted["b"])
    assert roles.is_served
    assert roles.detail == "12 of 12 expert shards loaded"


def test_stages_are_told_when_something_changed_and_not_otherwise() -> None:
    roles = roles_of(num_expected=1)
    assert not roles.has_news
    settle(roles, roles.join(expert("a"), 0.0))
    assert roles.has_news
    (action,) = roles.take_news([NodeId("s")])
    assert isinstance(action, Tell)
    assert isinstance(action.message, PublishPlacement)
    assert action.message.version == roles.version
    assert not roles.has_news
    roles.take_report(NodeId("a"), ALL)
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
    assert roles.take_report(NodeId("z"), ALL) == []
    assert all(owners == ["a"] for owners in published(roles).values())


# ---- nodes that see a part of the checkpoint


def seeing(name: str, *experts: int) -> NodeDescription:
    return expert(name, part=CheckpointPart(experts=frozenset(experts)))


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


# ---- any order of events


class Experts(RuleBasedStateMachine):
    """Nodes as they are: told to hold shards, they drop the others at once and load what is new one by one."""

    NAMES = "abcd"
    PARTS: ClassVar[dict[str, CheckpointPart]] = {}
    """What those see who do not see everything."""

    def __init__(self) -> None:
        super().__init__()
        self.roles = roles_of(copies=2)
        self.now_s = 0.0
        self.capacity: dict[str, int] = {}
        self.wanted: dict[str, frozenset[ShardId]] = {}
        self.held: dict[str, frozenset[ShardId]] = {}
        self.reported: dict[str, frozenset[ShardId]] = {}
        self.version = 0

    def carry_out(self, actions: list[Action]) -> None:
        for name, wanted in told(actions).items():
            assert name in self.held, "only the living are told anything"
            assert len(wanted) <= self.capacity[name], "nobody is told more than it has room for"
            assert {shard.expert for shard in wanted} <= self.sees(name), "nor what it does not see"
            self.wanted[name] = wanted
            self.held[name] &= wanted
        assert self.roles.version >= self.version
        self.version = self.roles.version

    def sees(self, name: str) -> frozenset[int]:
        return self.PARTS[name].experts if name in self.PARTS else frozenset(range(EXPERTS))

    @rule(name=st.sampled_from(NAMES), shards=st.integers(2, 14))
    def join(self, name: str, shards: int) -> None:
        if name not in self.held:
            self.capacity[name] = shards
            self.wanted[name] = self.held[name] = self.reported[name] = frozenset()
        described = expert(name, self.capacity[name], part=self.PARTS.get(name))
        self.carry_out(self.roles.join(described, self.now_s))

    @rule(name=st.sampled_from(NAMES))
    def lose(self, name: str) -> None:
        for kept in (self.capacity, self.wanted, self.held, self.reported):
            kept.pop(name, None)
        self.carry_out(self.roles.lose(NodeId(name), self.now_s))

    @rule(name=st.sampled_from(NAMES), count=st.integers(1, 12))
    def load(self, name: str, count: int) -> None:
        if name in self.held:
            missing = sorted(self.wanted[name] - self.held[name])
            self.held[name] |= frozenset(missing[:count])

    @rule(name=st.sampled_from(NAMES))
    def report(self, name: str) -> None:
        if name in self.held:
            self.reported[name] = self.held[name]
            self.carry_out(self.roles.take_report(NodeId(name), self.held[name]))

    @rule(seconds=st.floats(0.0, 2 * SETTLE_S))
    def time(self, seconds: float) -> None:
        self.now_s += seconds
        self.carry_out(self.roles.tick(self.now_s))

    @invariant()
    def only_who_holds_a_shard_is_asked_for_it(self) -> None:
        for shard, owners in published(self.roles).items():
            assert len(owners) == len(set(owners))
            assert all(shard in self.held[name] for name in owners), shard

    @invariant()
    def a_shard_that_somebody_has_ready_is_served(self) -> None:
        owners = published(self.roles)
        if owners:
            ready = {shard for name in self.held for shard in self.held[name] & self.reported[name]}
            assert {shard for shard, named in owners.items() if not named}.isdisjoint(ready)
            assert self.roles.is_served == all(owners.values())

    def teardown(self) -> None:
        """Left alone, every node loads what it is told; what fits is then served, copies and all."""
        self.time(2 * SETTLE_S)
        for _ in range(40):
            before = dict(self.wanted)
            for name in list(self.held):
                self.load(name, 99)
                self.report(name)
            if self.wanted == before and self.wanted == self.held:
                break
        assert self.wanted == self.held, "the rollout comes to an end"
        self.check_that_all_is_served()

    def check_that_all_is_served(self) -> None:
        if self.held and sum(min(count, len(ALL)) for count in self.capacity.values()) >= len(ALL):
            assert self.roles.is_served
            copies = sum(len(owners) for owners in published(self.roles).values())
            assert copies + self.roles.missing_copies == 2 * len(ALL)


class ExpertsOfParts(Experts):
    """With room for all that they see."""

    PARTS: ClassVar[dict[str, CheckpointPart]] = {
        "a": CheckpointPart(experts=frozenset({0, 1})),
        "b": CheckpointPart(experts=frozenset({1})),
        "c": CheckpointPart(experts=frozenset({0, 2})),
    }

    @rule(name=st.sampled_from(Experts.NAMES), shards=st.just(len(ALL)))
    def join(self, name: str, shards: int) -> None:
        super().join(name, shards)

    def check_that_all_is_served(self) -> None:
        if self.held:
            seen = frozenset[int]().union(*(self.sees(name) for name in self.held))
            assert {shard.expert for shard, owners in published(self.roles).items() if owners} == seen
            assert self.roles.is_served == (len(seen) == EXPERTS)


TestExperts = Experts.TestCase
TestExperts.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestExpertsOfParts = ExpertsOfParts.TestCase
TestExpertsOfParts.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# ---- a node that wants to stop


def ready_roles(names: str, **mesh: Any) -> ExpertRoles:
    roles, actions = roles_of(num_expected=len(names), **mesh), []
    for name in names:
        actions += roles.join(expert(name), 0.0)
    settle(roles, actions)
    return roles


def test_what_a_leaving_node_holds_alone_is_loaded_elsewhere_while_it_is_still_asked() -> None:
    roles = ready_roles("ab", copies=1)
    before = published(roles)
    alone = {shard for shard, owners in before.items() if owners == ["a"]}
    wanted = told(roles.drain(NodeId("a"), 1.0))
    assert wanted == {"b": ALL}, "the leaving node is told nothing: it keeps what it has"
    assert published(roles) == before
    assert roles.may_go(2.0) == []
    roles.take_report(NodeId("b"), ALL)
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
