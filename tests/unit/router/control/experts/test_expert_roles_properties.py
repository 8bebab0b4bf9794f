"""Who holds which shards, under any order of events."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.ids import NodeId
from common.topology import CheckpointPart, ShardId
from services.router.control.actions import Action
from services.router.control.experts.expert_roles import SETTLE_S
from tests.support.router.expert_shards import ALL, expert, published, roles_of, told
from tests.support.router.mesh_shapes import EXPERTS


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
            self.reported[name] &= wanted
        assert self.roles.version >= self.version
        self.version = self.roles.version

    def sees(self, name: str) -> frozenset[int]:
        return self.PARTS[name].experts if name in self.PARTS else frozenset(range(EXPERTS))

    @initialize(nodes=st.lists(st.tuples(st.integers(2, 14), st.integers(1, 12)), max_size=3))
    def begin(self, nodes: list[tuple[int, int]]) -> None:
        """With some loaded in part: from nothing few orders of events come so far that shards move."""
        started = list(zip(self.NAMES, nodes, strict=False))
        for name, (shards, _) in started:
            self.join(name, shards)
        for name, (_, count) in started:
            self.load(name, count)
            self.report(name)

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
            self.carry_out(self.roles.apply_report(NodeId(name), self.held[name]))

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
        super().join(name, len(ALL))

    def check_that_all_is_served(self) -> None:
        if self.held:
            seen = frozenset[int]().union(*(self.sees(name) for name in self.held))
            assert {shard.expert for shard, owners in published(self.roles).items() if owners} == seen
            assert self.roles.is_served == (len(seen) == EXPERTS)


class ExpertsOfLateReports(Experts):
    """A report is under way for a while; nodes come, go and are told anew meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.is_prompt = False
        self.under_way: dict[str, list[tuple[int, frozenset[ShardId]]]] = {}
        """By node, oldest first: the version of what it had been told, and what it held."""

    @rule(name=st.sampled_from(Experts.NAMES))
    def lose(self, name: str) -> None:
        self.under_way.pop(name, None)
        super().lose(name)

    @rule(name=st.sampled_from(Experts.NAMES))
    def report(self, name: str) -> None:
        if name in self.held:
            self.under_way.setdefault(name, []).append((self.roles.versions.get(name, 0), self.held[name]))
        if self.is_prompt:
            self.report_comes(name)

    @rule(name=st.sampled_from(Experts.NAMES))
    def report_comes(self, name: str) -> None:
        if self.under_way.get(name):
            version, held = self.under_way[name].pop(0)
            if version == self.roles.versions.get(name, 0):
                self.reported[name] = held
            self.carry_out(self.roles.apply_report(NodeId(name), held, version))

    def teardown(self) -> None:
        self.is_prompt = True
        self.under_way.clear()
        super().teardown()


class ExpertsOfLatePlacements(Experts):
    """A placement takes a while to be computed; nodes come, go and report meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.roles.is_prompt = False

    @rule()
    def placement_comes(self) -> None:
        self.carry_out(self.roles.deliver())

    def teardown(self) -> None:
        self.roles.is_prompt = True
        for _ in range(3):  # the first may be out of date
            self.placement_comes()
            self.time(0.0)
        super().teardown()


TestExpertsOfLatePlacements = ExpertsOfLatePlacements.TestCase
TestExpertsOfLatePlacements.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestExpertsOfLateReports = ExpertsOfLateReports.TestCase
TestExpertsOfLateReports.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestExperts = Experts.TestCase
TestExperts.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestExpertsOfParts = ExpertsOfParts.TestCase
TestExpertsOfParts.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
