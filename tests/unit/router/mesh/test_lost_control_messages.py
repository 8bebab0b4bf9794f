"""Whatever control message is lost, late or doubled, in whichever direction: soon everybody believes what is true."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from common.messages import (
    AssignMirror,
    AssignShards,
    AssignStage,
    Heartbeat,
    Leave,
    LeaveAcknowledged,
    Message,
    MirrorReady,
    MirrorTo,
    PublishPlacement,
    ShardsReady,
    StageReady,
    Unassign,
)
from common.topology import NodeKind
from services.router.control.stage_roles import GIVE_UP_S
from tests.support.router.believing_mesh import BelievingMesh, faithful
from tests.support.router.mesh_shapes import EXPERTS, LAYERS

HEALED_WITHIN_S = 1.2


def started(**mesh: int) -> BelievingMesh:
    """Two slots, two mirrors, two expert nodes, and all agree."""
    made = BelievingMesh(**({"spares": 2} | mesh))
    for name in "abcd":
        made.join(name)
    for name in "xy":
        made.join(name, NodeKind.EXPERT)
    made.live(4.0)
    assert made.differences() == []
    return made


class Loses:
    """All of one kind of message for a moment, in both directions."""

    def __init__(self, mesh: BelievingMesh, kind: type[Message], for_s: float = 0.3) -> None:
        self.mesh, self.kind, self.until_s, self.lost = mesh, kind, mesh.now_s + for_s, 0

    def __call__(self, name: str, message: Message) -> list[float]:
        if isinstance(message, self.kind) and (not self.lost or self.mesh.now_s < self.until_s):
            self.lost += 1
            return []
        return [0.0]


def holder_of_first_slot(mesh: BelievingMesh) -> str:
    (pipeline, *_) = mesh.stages.pipelines.values()
    assert pipeline.holders[0] is not None
    return pipeline.holders[0]


def restart_a_stage(mesh: BelievingMesh) -> None:
    mesh.lose(holder_of_first_slot(mesh))
    mesh.join("e")


def restart_an_expert_node(mesh: BelievingMesh) -> None:
    mesh.lose("x")
    mesh.join("z", NodeKind.EXPERT)


def stop_an_expert_node(mesh: BelievingMesh) -> None:
    mesh.leave("x")


def stop_a_stage(mesh: BelievingMesh) -> None:
    mesh.leave(holder_of_first_slot(mesh))


CASES = [
    (AssignStage, restart_a_stage),
    (StageReady, restart_a_stage),
    (AssignMirror, restart_a_stage),
    (MirrorReady, restart_a_stage),
    (MirrorTo, restart_a_stage),
    (PublishPlacement, restart_an_expert_node),
    (AssignShards, restart_an_expert_node),
    (ShardsReady, restart_an_expert_node),
    (Leave, stop_an_expert_node),
    (LeaveAcknowledged, stop_an_expert_node),
    (Leave, stop_a_stage),
    (LeaveAcknowledged, stop_a_stage),
]


@pytest.mark.parametrize(("kind", "event"), CASES, ids=[f"{k.__name__}-{e.__name__}" for k, e in CASES])
def test_what_a_lost_message_was_to_bring_about_comes_about_a_second_later(
    kind: type[Message], event: Callable[[BelievingMesh], None]
) -> None:
    undisturbed, lossy = started(), started()
    lossy.fate = fate = Loses(lossy, kind)
    for mesh in (undisturbed, lossy):
        event(mesh)
    assert until_all_agree(lossy) <= until_all_agree(undisturbed) + HEALED_WITHIN_S
    assert fate.lost, "it was sent"


def until_all_agree(mesh: BelievingMesh) -> float:
    began_s = mesh.now_s
    mesh.live(0.05)
    while mesh.differences() and mesh.now_s < began_s + 20.0:
        mesh.live(0.05)
    return mesh.now_s - began_s


def test_the_last_report_of_a_mirror_that_is_complete_may_be_lost() -> None:
    mesh = started()
    mesh.fate = lambda name, message: [] if isinstance(message, MirrorReady) and message.is_complete else [0.0]
    restart_a_stage(mesh)
    mesh.live(5.0)
    assert mesh.differences() == [], "its heartbeats say so"


def test_a_stage_that_was_not_told_that_it_is_a_spare_is_told_again() -> None:
    mesh = started()
    for name in "ef":
        mesh.join(name)
    mesh.live(4.0)
    assert len(mesh.stages.pipelines) == 2
    mesh.fate = fate = Loses(mesh, Unassign)
    for name in mesh.stages.mirrors.nodes.values():
        mesh.lose(name)  # a pipeline too many is given up, so that there are spares again
    mesh.live(GIVE_UP_S + 6.0)
    assert fate.lost
    assert len(mesh.stages.pipelines) == 1
    assert mesh.differences() == []


def test_in_a_mesh_that_agrees_nobody_is_told_anything_again() -> None:
    mesh = started()
    mesh.told.clear()
    mesh.live(10.0)
    assert [type(message) for _, message, _ in mesh.told] == []


def test_a_message_that_takes_its_time_is_not_repeated() -> None:
    mesh = started()
    mesh.fate = lambda name, message: [0.15]
    mesh.told.clear()
    restart_a_stage(mesh)
    mesh.live(5.0)
    assert mesh.differences() == []
    by_key = [(name, type(message), header.generation) for name, message, header in mesh.told if header.generation]
    assert len(by_key) == len(set(by_key))


def test_doubled_messages_neither_load_anything_again_nor_begin_a_copy_anew() -> None:
    mesh = started()
    mesh.fate = lambda name, message: [0.0, 0.3, 1.0]
    restart_a_stage(mesh)
    mesh.live(6.0)
    assert mesh.differences() == []
    assert mesh.believers["e"].num_loads == 1
    assert all(believer.num_feeds <= 2 for believer in mesh.believers.values())


def test_a_node_that_never_hears_is_told_less_and_less_often() -> None:
    mesh = started()
    mesh.fate = lambda name, message: [] if isinstance(message, MirrorTo) else [0.0]
    mesh.told.clear()
    restart_a_stage(mesh)
    mesh.live(20.0)
    assert 5 <= sum(isinstance(message, MirrorTo) for _, message, _ in mesh.told) <= 20


def test_redundancy_that_is_missing_is_a_warning_until_it_is_back() -> None:
    mesh = started()
    assert mesh.loop.status.readiness.warnings == ()
    mesh.fate = lambda name, message: [] if isinstance(message, MirrorTo) else [0.0]
    restart_a_stage(mesh)
    mesh.live(6.0)
    readiness = mesh.loop.status.readiness
    assert readiness.ready, readiness.detail
    assert readiness.warnings == ("slots without a mirror that could take over: 1",)
    mesh.fate = faithful
    mesh.live(4.0)
    assert mesh.loop.status.readiness.warnings == ()


def test_spares_that_should_be_there_are_missed_and_those_that_nobody_asked_for_are_not() -> None:
    mesh = started()
    for mirror in mesh.stages.mirrors.nodes.values():
        mesh.lose(mirror)
    mesh.live(1.0)
    assert mesh.loop.status.redundancy.missing_mirrors == 2
    others = BelievingMesh(spares=0)
    for name in "ab":
        others.join(name)
    others.join("x", NodeKind.EXPERT)
    others.join("y", NodeKind.EXPERT)
    others.live(4.0)
    assert others.loop.status.readiness.warnings == ()


def test_a_safety_copy_that_is_not_loaded_is_a_warning() -> None:
    mesh = started()
    mesh.fate = lambda name, message: [] if isinstance(message, ShardsReady) else [0.0]
    restart_an_expert_node(mesh)
    mesh.live(6.0)
    assert mesh.loop.status.redundancy.copies_to_load == LAYERS * EXPERTS
    (warning,) = mesh.loop.status.readiness.warnings
    assert "yet to be loaded" in warning
    mesh.fate = faithful
    mesh.live(4.0)
    assert mesh.loop.status.readiness.warnings == ()


class LossyMesh(RuleBasedStateMachine):
    """Nodes come, go and leave over links that lose, delay and double anything."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh = BelievingMesh(spares=2)
        self.num_joined = 0
        self.random = random.Random(0)
        self.shares = (0.0, 0.0, 0.0)
        for kind in (NodeKind.STAGE,) * 4 + (NodeKind.EXPERT,) * 2:
            self.join(kind)
        self.mesh.fate = self.fate

    def fate(self, name: str, message: Message) -> list[float]:
        lost, late, doubled = self.shares
        if isinstance(message, Heartbeat):
            lost = lost / 2
        if self.random.random() < lost:
            return []
        arrivals = [self.random.uniform(0.0, 1.0) if self.random.random() < late else 0.0]
        return arrivals + [self.random.uniform(0.0, 2.0)] * (self.random.random() < doubled)

    @rule(
        seed=st.integers(0, 1 << 16),
        lost=st.sampled_from([0.0, 0.1, 0.5]),
        late=st.sampled_from([0.0, 0.3]),
        doubled=st.sampled_from([0.0, 0.3]),
    )
    def links_change(self, seed: int, lost: float, late: float, doubled: float) -> None:
        self.random, self.shares = random.Random(seed), (lost, late, doubled)

    @rule(kind=st.sampled_from(NodeKind))
    def join(self, kind: NodeKind) -> None:
        if len(self.mesh.believers) < 10:
            self.num_joined += 1
            self.mesh.join(f"{kind.value[0]}{self.num_joined}", kind)

    @rule(number=st.integers(0, 9))
    def lose(self, number: int) -> None:
        names = sorted(self.mesh.believers)
        if names:
            self.mesh.lose(names[number % len(names)])

    @rule(number=st.integers(0, 9))
    def leave(self, number: int) -> None:
        names = sorted(name for name, believer in self.mesh.believers.items() if not believer.is_leaving)
        if names:
            self.mesh.leave(names[number % len(names)])

    @rule(number=st.integers(0, 3))
    def fail_a_step(self, number: int) -> None:
        for pipeline in list(self.mesh.stages.pipelines)[number : number + 1]:
            self.mesh.loop._renew([pipeline], self.mesh.now_s)

    @rule(seconds=st.sampled_from([0.05, 0.2, 1.0, 3.0]))
    def live(self, seconds: float) -> None:
        self.mesh.live(seconds)

    @invariant()
    def nothing_of_the_scheduler_is_lost(self) -> None:
        self.mesh.scheduler.check_invariants()

    def teardown(self) -> None:
        """Links that work again make everybody agree, whatever was lost before."""
        self.mesh.fate = faithful
        for kind in (NodeKind.STAGE,) * 3 + (NodeKind.EXPERT,) * 2:
            self.num_joined += 1
            self.mesh.join(f"{kind.value[0]}{self.num_joined}", kind)
        self.mesh.live(25.0)  # who leaves is waited for at most 12 s
        assert self.mesh.differences() == []
        assert self.mesh.loop.status.readiness.ready


TestLossyMesh = LossyMesh.TestCase
TestLossyMesh.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
