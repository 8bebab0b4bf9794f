from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError, ConfigurationError, NodeLostError, ProtocolError
from common.ids import Incarnation, NodeId
from common.topology import CheckpointPart, LayerRange, NodeDescription, NodeKind
from services.router.control.membership import (
    LIFELINE_OPEN_S,
    LONGEST_TURN_S,
    MAX_REMEMBERED_DEAD,
    ChangeReason,
    DeclaredDead,
    Membership,
    MembershipChange,
    NodeState,
    check_hello,
    patience_for,
    refuse_other_device,
)
from tests.support.router.fake_mesh import hello_of
from tests.support.router.mesh_shapes import EXPERTS, LAYERS, node, small_model

A, B = NodeId("stage-a"), NodeId("stage-b")
FIRST, SECOND = Incarnation(1), Incarnation(2)
PATIENCE_S = 10.0
NODE_A = NodeId("a")


def with_member(now_s: float = 0.0) -> Membership:
    membership = Membership(PATIENCE_S)
    membership.join(A, FIRST, now_s)
    membership.lifeline_opened(A, FIRST, now_s)
    return membership


def beat(
    membership: Membership, now_s: float, progress: int = 0, is_busy: bool = False, incarnation: Incarnation = FIRST
) -> list[MembershipChange]:
    return membership.heartbeat(A, incarnation, progress, is_busy, now_s)


def only(changes: list[MembershipChange]) -> tuple[NodeState | None, NodeState, ChangeReason]:
    (change,) = changes
    return change.before, change.after, change.reason


def test_joiner_is_alive() -> None:
    membership = Membership(PATIENCE_S)
    assert only(membership.join(A, FIRST, 0.0)) == (None, NodeState.ALIVE, ChangeReason.JOINED)
    assert membership.state_of(A) is NodeState.ALIVE
    assert membership.living() == {A: NodeState.ALIVE}


def test_second_hello_of_the_same_incarnation_is_a_heartbeat() -> None:
    membership = with_member()
    assert membership.join(A, FIRST, 4.9) == []
    assert membership.tick(6.0) == []


def test_silent_node_is_suspect_then_dead() -> None:
    membership = with_member()
    assert membership.tick(4.9) == []
    assert only(membership.tick(5.0)) == (NodeState.ALIVE, NodeState.SUSPECT, ChangeReason.SILENT)
    assert membership.tick(9.9) == []
    assert only(membership.tick(10.0)) == (NodeState.SUSPECT, NodeState.DEAD, ChangeReason.SILENT)
    assert membership.state_of(A) is NodeState.DEAD
    assert membership.living() == {}


def test_heartbeat_clears_suspicion() -> None:
    membership = with_member()
    membership.tick(6.0)
    assert only(beat(membership, 6.1)) == (NodeState.SUSPECT, NodeState.ALIVE, ChangeReason.HEARD)


def test_closed_lifeline_is_suspect_at_once_and_dead_after_the_grace_whatever_heartbeats_say() -> None:
    membership = with_member()
    closed = membership.lifeline_closed(A, FIRST, 1.0)
    assert only(closed) == (NodeState.ALIVE, NodeState.SUSPECT, ChangeReason.LIFELINE_CLOSED)
    assert beat(membership, 1.02) == []
    assert membership.lifeline_closed(A, FIRST, 1.03) == []  # does not begin anew
    assert only(membership.tick(1.05)) == (NodeState.SUSPECT, NodeState.DEAD, ChangeReason.LIFELINE_CLOSED)


def test_a_lifeline_that_closed_where_nobody_listens_any_more_is_not_waited_for() -> None:
    membership = with_member()
    gone = membership.lose(A, FIRST, ChangeReason.LIFELINE_CLOSED)
    assert only(gone) == (NodeState.ALIVE, NodeState.DEAD, ChangeReason.LIFELINE_CLOSED)
    assert membership.lose(A, FIRST, ChangeReason.LIFELINE_CLOSED) == []
    assert membership.join(A, FIRST, 1.1) == [], "dead is final"


def test_a_lost_pulse_is_the_end_and_of_another_incarnation_no_news() -> None:
    membership = with_member()
    assert membership.lose(A, SECOND, ChangeReason.NO_PULSE) == []
    assert only(membership.lose(A, FIRST, ChangeReason.NO_PULSE)) == (
        NodeState.ALIVE,
        NodeState.DEAD,
        ChangeReason.NO_PULSE,
    )


def test_a_node_whose_lifeline_never_opens_is_dead_whatever_its_heartbeats_say() -> None:
    membership = Membership(PATIENCE_S)
    membership.join(A, FIRST, 0.0)
    for now_s in range(1, 10):
        assert beat(membership, now_s) == []
    assert membership.join(A, FIRST, 9.5) == [], "another hello does not begin the wait anew"
    assert membership.tick(LIFELINE_OPEN_S - 0.1) == []
    assert only(membership.tick(10.0)) == (NodeState.ALIVE, NodeState.DEAD, ChangeReason.UNREACHABLE)


def test_lifeline_that_opens_again_in_time_saves_the_node() -> None:
    membership = with_member()
    membership.lifeline_closed(A, FIRST, 1.0)
    assert only(membership.lifeline_opened(A, FIRST, 1.04)) == (
        NodeState.SUSPECT,
        NodeState.ALIVE,
        ChangeReason.HEARD,
    )
    assert membership.tick(1.2) == []


def test_busy_node_without_progress_is_suspect_then_dead_though_it_beats() -> None:
    membership = with_member()
    changes = []
    for second in range(1, 40):
        changes += [(second, *only([change])[1:]) for change in beat(membership, float(second), 7, is_busy=True)]
    assert changes == [
        (11, NodeState.SUSPECT, ChangeReason.NO_PROGRESS),
        (21, NodeState.DEAD, ChangeReason.NO_PROGRESS),
    ]


def test_progress_or_idleness_keeps_a_node_alive() -> None:
    membership = with_member()
    for second in range(1, 60):
        assert beat(membership, float(second), progress=second // 10, is_busy=True) == []
    for second in range(60, 120):
        assert beat(membership, float(second), progress=6, is_busy=False) == []
    assert beat(membership, 120.0, progress=6, is_busy=True) == []  # the work has only just come


def test_node_that_leaves_is_dead_without_suspicion() -> None:
    membership = with_member()
    assert only(membership.lose(A, FIRST, ChangeReason.LEFT)) == (NodeState.ALIVE, NodeState.DEAD, ChangeReason.LEFT)
    assert membership.lose(A, FIRST, ChangeReason.LEFT) == []


def test_new_incarnation_replaces_the_old() -> None:
    membership = with_member()
    old, new = membership.join(A, SECOND, 1.0)
    assert (old.incarnation, old.after, old.reason) == (FIRST, NodeState.DEAD, ChangeReason.REPLACED)
    assert (new.incarnation, new.before, new.after) == (SECOND, None, NodeState.ALIVE)
    assert membership.join(A, FIRST, 1.1) == []
    assert beat(membership, 1.2, incarnation=FIRST) == []
    assert membership.lifeline_closed(A, FIRST, 1.3) == []
    assert membership.tick(1.5) == []


def test_dead_incarnation_does_not_come_back() -> None:
    membership = with_member()
    membership.tick(10.0)
    assert beat(membership, 10.1) == []
    assert membership.join(A, FIRST, 10.2) == []
    assert membership.state_of(A) is NodeState.DEAD
    assert only(membership.join(A, SECOND, 10.3)) == (None, NodeState.ALIVE, ChangeReason.JOINED)


def test_an_unknown_node_is_ignored() -> None:
    membership = with_member()
    assert membership.lifeline_opened(B, FIRST, 0.0) == []
    assert membership.state_of(B) is NodeState.DEAD


def test_memory_of_the_dead_is_bounded() -> None:
    membership = Membership(PATIENCE_S)
    for number in range(MAX_REMEMBERED_DEAD + 5):
        membership.join(NodeId(f"n{number}"), FIRST, 0.0)
        membership.lose(NodeId(f"n{number}"), FIRST, ChangeReason.LEFT)
    assert membership.join(NodeId(f"n{MAX_REMEMBERED_DEAD}"), FIRST, 1.0) == []
    assert len(membership.join(NodeId("n0"), FIRST, 1.0)) == 1


def apply(
    membership: Membership, event: str, node_id: NodeId, incarnation: Incarnation, is_busy: bool, now_s: float
) -> list[MembershipChange]:
    match event:
        case "join":
            return membership.join(node_id, incarnation, now_s)
        case "beat":
            return membership.heartbeat(node_id, incarnation, 1, is_busy, now_s)
        case "close":
            return membership.lifeline_closed(node_id, incarnation, now_s)
        case "open":
            return membership.lifeline_opened(node_id, incarnation, now_s)
        case "leave":
            return membership.lose(node_id, incarnation, ChangeReason.LEFT)
        case _:
            return membership.tick(now_s)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 6.0),
            st.sampled_from(["join", "beat", "close", "open", "leave", "tick"]),
            st.sampled_from([A, B]),
            st.integers(1, 2),
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_changes_tell_the_whole_story(events: list[tuple[float, str, NodeId, int, bool]]) -> None:
    """Following the changes gives the same states, and dead is final."""
    membership, now_s = Membership(PATIENCE_S), 0.0
    story: dict[NodeId, NodeState] = {}
    dead: set[tuple[NodeId, Incarnation]] = set()
    for wait_s, event, node_id, number, is_busy in events:
        incarnation = Incarnation(number)
        now_s += wait_s
        changes = apply(membership, event, node_id, incarnation, is_busy, now_s)
        for change in changes:
            assert (change.node_id, change.incarnation) not in dead
            assert story.get(change.node_id) == change.before
            assert change.before != change.after
            if change.after is NodeState.DEAD:
                dead.add((change.node_id, change.incarnation))
                del story[change.node_id]
            else:
                story[change.node_id] = change.after
        assert membership.living() == dict(sorted(story.items()))


def test_what_an_observer_slept_through_is_nobodys_silence() -> None:
    membership = with_member()
    for second in range(5):
        membership.turn(float(second))
        beat(membership, float(second), progress=7, is_busy=True)
    membership.turn(100.0)
    assert beat(membership, 100.0, progress=7, is_busy=True) == [], "it said so long ago"
    assert membership.tick(100.0) == []
    assert only(membership.tick(100.0 + PATIENCE_S / 2))[1:] == (NodeState.SUSPECT, ChangeReason.SILENT)


def test_a_node_that_nothing_is_heard_of_after_the_observer_slept_dies_as_any_other() -> None:
    membership = with_member()
    membership.turn(0.0)
    now_s = 300.0
    membership.turn(now_s)
    while membership.state_of(A) is not NodeState.DEAD:
        now_s += 0.1
        membership.turn(now_s)
        membership.tick(now_s)
    assert now_s == pytest.approx(300.0 + PATIENCE_S - LONGEST_TURN_S, abs=0.2)


def test_a_clock_that_stands_still_or_goes_back_kills_nobody() -> None:
    membership = with_member(100.0)
    for now_s in (100.0, 100.0, 40.0, 40.5, 41.0):
        membership.turn(now_s)
        assert membership.tick(now_s) == []


@pytest.mark.parametrize(("step_deadline_s", "interval_s"), [(0.1, 0.25), (0.1, 0.02), (1.0, 1.0), (60.0, 0.25)])
def test_a_busy_node_whose_heartbeats_come_in_time_is_alive_however_short_steps_may_be(
    step_deadline_s: float, interval_s: float
) -> None:
    membership = Membership(patience_for(step_deadline_s, interval_s))
    membership.join(A, FIRST, 0.0)
    membership.lifeline_opened(A, FIRST, 0.0)
    for number in range(1, 20):
        assert membership.tick((number - 0.01) * interval_s) == []
        assert beat(membership, number * interval_s, progress=number, is_busy=True) == []


@pytest.mark.parametrize(
    ("is_alone", "is_late", "grace_s"), [(False, False, 0.05), (False, True, 6.0), (True, True, 30.0)]
)
def test_a_closed_lifeline_has_longer_to_open_where_the_observers_own_link_is_bad(
    is_alone: bool, is_late: bool, grace_s: float
) -> None:
    membership = Membership(patience_s=80.0)
    membership.join(A, FIRST, 0.0)
    membership.lifeline_opened(A, FIRST, 0.0)
    membership.is_alone, membership.is_late = is_alone, is_late
    membership.lifeline_closed(A, FIRST, 1.0)
    assert membership.tick(1.0 + grace_s - 0.01) == []
    assert only(membership.tick(1.0 + grace_s)) == (NodeState.SUSPECT, NodeState.DEAD, ChangeReason.LIFELINE_CLOSED)


def test_a_refused_lifeline_is_a_death_at_once_also_where_the_observers_own_link_is_bad() -> None:
    membership = with_member()
    membership.is_late = True
    assert only(membership.lose(A, FIRST, ChangeReason.LIFELINE_CLOSED))[1] is NodeState.DEAD


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
    dead.add(death(NODE_A, ChangeReason.SILENT), node("a"))
    for _ in range(2):
        with pytest.raises(NodeLostError, match=r"a was declared dead \(silent\): it must come back as another"):
            dead.refuse(NODE_A)
    dead.refuse(NodeId("b"))


def test_who_could_not_be_reached_is_told_where_and_to_end_since_another_incarnation_could_not_be_either() -> None:
    dead = DeclaredDead()
    dead.add(death(NODE_A, ChangeReason.UNREACHABLE), node("a"))
    with pytest.raises(ConfigurationError, match="cannot connect to a at tcp://a:2: ADVERTISE_HOST must be"):
        dead.refuse(NODE_A)


def test_the_longest_dead_are_forgotten() -> None:
    dead = DeclaredDead()
    for number in range(MAX_REMEMBERED_DEAD + 1):
        dead.add(death(NodeId(f"node-{number}"), ChangeReason.SILENT), None)
    dead.refuse(NodeId("node-0"))
    with pytest.raises(NodeLostError):
        dead.refuse(NodeId("node-1"))
