"""Slots of a router before this one: they go back to their holders, whoever comes first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from common.ids import NodeId, PipelineId, SlotIndex
from common.messages import AssignMirror, Unassign
from common.topology import StageSlot
from services.router.control.actions import Action, OpenPipeline, SuspendPipeline, Tell
from services.router.control.adoption import ADOPT_S, OPEN_S, HeldCache, HeldSequence, HeldSlot
from services.router.control.stage_roles import StageRoles
from tests.support.router.mesh_shapes import node
from tests.support.router.stage_reports import mirror_of, mirrored, report, roles_of, told


def held(pipeline: int, slot: int, roles: StageRoles, sequences: dict[int, HeldSequence]) -> HeldSlot:
    return HeldSlot(pipeline, slot, 2, roles.layers[slot], 5, 32, 900 + slot, sequences)


def test_a_restarted_router_gives_slots_back_to_their_holders_with_what_both_have() -> None:
    roles = roles_of(adopts=True, spares=1)
    assert roles.join(node("s"), 0.0) == [], "a spare may be back first"
    sequences = {1: HeldSequence((0, 1), 40), 2: HeldSequence((2,), 9)}
    assert roles.join(node("b"), 0.1, held(0, 1, roles, {1: HeldSequence((0,), 30)})) == []
    actions = roles.join(node("a"), 0.2, held(0, 0, roles, sequences))
    assert {name: message.slot for name, (message, _) in told(actions).items()} == {"a": 0, "b": 1}
    assert {message.lease_term for message, _ in told(actions).values()} == {5}
    (opening, *_) = report(roles, actions)
    assert isinstance(opening, OpenPipeline)
    assert opening.held == HeldCache({1: HeldSequence((0, 1), 30)}, (2,), {0: 900, 1: 901})


def test_a_restarted_router_fills_a_hole_once_its_holder_had_time_to_come_back() -> None:
    roles = roles_of(adopts=True, spares=1)
    roles.join(node("s"), 0.0)
    assert roles.join(node("a"), 0.1, held(0, 0, roles, {1: HeldSequence((0,), 9)})) == []
    assert roles.waits
    assert roles.tick(1.4) == []
    actions = roles.tick(1.5)
    assert {name: message.slot for name, (message, _) in told(actions).items()} == {"a": 0, "s": 1}
    (opening, *_) = report(roles, actions)
    assert isinstance(opening, OpenPipeline)
    assert opening.held is not None
    assert opening.held.sequences == {1: HeldSequence((0,), 9)}
    assert not roles.waits


def test_who_fills_the_slot_of_one_that_reported_and_died_does_not_stand_for_its_report() -> None:
    roles = roles_of(adopts=True, spares=1)
    roles.join(node("s"), 0.0)
    for slot, name in enumerate("ab"):
        actions = roles.join(node(name), 0.1, held(0, slot, roles, {1: HeldSequence((0,), 9)}))
    assert told(actions).keys() == {"a", "b"}
    roles.tick(ADOPT_S)
    (opening, *_) = report(roles, roles.lose(NodeId("b")))
    assert isinstance(opening, OpenPipeline)
    assert opening.held == HeldCache({1: HeldSequence((0,), 9)}, (), {0: 900})


def test_who_claims_a_slot_that_was_given_back_already_is_told_to_forget_it_before_it_gets_another_role() -> None:
    roles = roles_of(adopts=True, spares=1)
    for slot, name in enumerate("ab"):
        actions = roles.join(node(name), 0.0, held(0, slot, roles, {}))
    roles.tick(ADOPT_S)
    report(roles, actions)
    forget, mirror, *_ = roles.join(node("late"), 2.0, held(0, 1, roles, {}))
    assert isinstance(forget, Tell)
    assert (forget.node_id, forget.message) == ("late", Unassign(5))
    assert mirror_of([mirror]).keys() == {"late"}


def test_a_late_claim_that_is_said_twice_leaves_no_mirror_that_was_told_to_forget_in_between() -> None:
    roles = roles_of(adopts=True, spares=1)
    for slot, name in enumerate("ab"):
        actions = roles.join(node(name), 0.0, held(0, slot, roles, {}))
    roles.tick(ADOPT_S)
    report(roles, actions)
    for _ in range(2):
        actions = roles.join(node("late"), 2.0, held(0, 1, roles, {}))
        assert [type(a.message) for a in actions if isinstance(a, Tell)] == [Unassign, AssignMirror]
    mirrored(roles, actions)
    assert roles.mirrors.num_complete == 1


def test_slots_whose_holders_have_no_room_for_them_any_more_are_not_given_back() -> None:
    roles = roles_of(adopts=True)
    roles.join(node("a", capacity_bytes=1000), 0.0, held(0, 0, roles, {1: HeldSequence((0,), 9)}))
    actions = roles.join(node("b"), 0.1, held(0, 1, roles, {1: HeldSequence((0,), 9)}))
    assert [(a.node_id, a.message) for a in actions if isinstance(a, Tell)] == [("a", Unassign(5)), ("b", Unassign(5))]
    assert told(roles.tick(ADOPT_S)) == {}
    assert "its node offers 1000 bytes" in roles.detail
    assert told(roles.join(node("c"), 2.0)).keys() == {"b", "c"}


HOLDERS = [("a", 0, 0), ("b", 0, 1), ("c", 1, 0), ("d", 1, 1), ("e", 2, 0), ("f", 2, 1)]
"""Name, pipeline, slot."""


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.permutations([*HOLDERS, ("s", None, None), ("t", None, None)]),
    delays_s=st.lists(st.floats(0.0, 0.17), min_size=8, max_size=8),
    is_ready_at_once=st.booleans(),
)
def test_holders_that_are_back_in_time_get_their_slots_and_leases_in_whatever_order(
    arrivals: list[tuple[str, int, int]], delays_s: list[float], is_ready_at_once: bool
) -> None:
    roles = roles_of(adopts=True, spares=2)
    now_s, assigned, openings = 0.0, dict[str, tuple[int, int, int]](), list[OpenPipeline]()
    for (name, pipeline, slot), delay_s in zip(arrivals, delays_s, strict=True):
        now_s += delay_s
        own = held(pipeline, slot, roles, {pipeline: HeldSequence((0,), 9)}) if pipeline is not None else None
        actions = roles.tick(now_s) + roles.join(node(name), now_s, own)
        for node_id, (message, _) in told(actions).items():
            assert node_id not in assigned, "told once"
            assigned[node_id] = message.pipeline, message.slot, message.lease_term
        assert not mirror_of(actions), "one that is not known yet may hold what it would be told to drop"
        if is_ready_at_once:
            openings += [action for action in report(roles, actions) if isinstance(action, OpenPipeline)]
    assert assigned == {name: (pipeline, slot, 5) for name, pipeline, slot in HOLDERS}
    assert all(opening.held and opening.held.sequences.keys() == {opening.pipeline} for opening in openings)
    assert roles.waits
    follows = mirror_of(roles.tick(ADOPT_S + now_s))
    assert follows.keys() == ({"s", "t"} if is_ready_at_once else set())
    assert not roles.waits


def two_pipelines(roles: StageRoles, names: str, now_s: float) -> list[Action]:
    """Holders come back, each with the one sequence of its pipeline."""
    actions: list[Action] = []
    for name, pipeline, slot in HOLDERS:
        if name in names:
            own = held(pipeline, slot, roles, {pipeline: HeldSequence((0,), 9)})
            actions += roles.join(node(name), now_s, own)
    return actions


def time_is_up(roles: StageRoles) -> float:
    """A time from which on nobody else is waited for."""
    roles.tick(ADOPT_S)
    return ADOPT_S


def test_a_sequence_is_awaited_until_the_pipeline_that_holds_it_is_open() -> None:
    roles = roles_of(adopts=True)
    report(roles, two_pipelines(roles, "ab", 0.0))
    assert roles.num_open == 1
    assert not roles.is_awaited(0, 0.0), "its pipeline is open"
    assert roles.is_awaited(1, 0.1), "somebody who is not back yet may have it"
    actions = two_pipelines(roles, "cd", 0.2)
    assert roles.is_awaited(1, ADOPT_S + 0.1), "its pipeline is about to open"
    assert not roles.is_awaited(2, time_is_up(roles)), "nobody has it"
    report(roles, actions)
    assert roles.num_open == 2
    assert not roles.is_awaited(1, ADOPT_S + 0.1)


def test_a_sequence_is_not_awaited_for_ever_and_not_where_it_would_be_computed_again_as_well() -> None:
    roles = roles_of(adopts=True)
    two_pipelines(roles, "abcd", 0.0)
    now_s = time_is_up(roles)
    assert roles.is_awaited(1, now_s)
    assert not roles.is_awaited(1, now_s + OPEN_S), "its pipeline does not open"
    roles.join(node("s"), now_s)
    roles.lose(NodeId("d"))
    assert roles.pipelines[PipelineId(1)].is_whole
    assert not roles.is_awaited(1, now_s), "a slot of it is empty"


def test_a_pipeline_that_loses_a_holder_while_others_are_waited_for_is_suspended_and_filled_afterwards() -> None:
    roles = roles_of(adopts=True, spares=1)
    report(roles, two_pipelines(roles, "abc", 0.0))
    roles.join(node("s"), 0.1)
    assert roles.lose(NodeId("b")) == [SuspendPipeline(PipelineId(0))]
    assert roles.slot_of(NodeId("a")) == StageSlot(PipelineId(0), SlotIndex(0))
    assert two_pipelines(roles, "d", 0.3), "the other pipeline is adopted meanwhile"
    assert told(roles.tick(ADOPT_S))["s"][0].slot == 1


def test_a_holder_that_leaves_during_an_adoption_waits_to_see_who_could_be_its_mirror() -> None:
    roles = roles_of(adopts=True, spares=1)
    two_pipelines(roles, "b", 0.0)
    roles.drain(NodeId("b"))
    assert roles.leaving == [NodeId("b")], "nobody else is there"
    roles.join(node("s"), 0.1)
    roles.drain(NodeId("s"))
    roles.join(node("t"), 0.1)
    assert roles.leaving == [NodeId("s")], "a spare has nothing to hand over"
    report(roles, two_pipelines(roles, "a", 0.2))
    assert roles.num_open == 1
    assert NodeId("b") not in roles.leaving
    assert mirror_of(roles.tick(ADOPT_S))["t"].slot == 1
    assert NodeId("b") not in roles.leaving
