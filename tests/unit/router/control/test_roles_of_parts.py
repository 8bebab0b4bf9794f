"""Slots of pipelines where stage nodes see the weights of some slots only."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from common.ids import NodeId, PipelineId, SlotIndex
from common.topology import StageSlot
from services.router.control.roles import ObservedStage, RolePlan, plan_roles


def slot(pipeline: int, index: int) -> StageSlot:
    return StageSlot(PipelineId(pipeline), SlotIndex(index))


def nodes(names: str, classes: str | None = None) -> list[ObservedStage]:
    """In the order in which they joined: the name begins with the slot that a node sees, or with "w" for the whole."""
    found = []
    for order, name in enumerate(names.split()):
        seen = None if name[0] == "w" else frozenset(int(letter) for letter in name if letter.isdigit())
        found.append(ObservedStage(NodeId(name), (classes or "x" * 99)[order], order, seen))
    return found


def held(plan: RolePlan) -> str:
    """Holders by pipeline and index."""
    return " ".join(plan.assignments.values())


def without(plan: RolePlan, names: str, *gone: str) -> list[ObservedStage]:
    assert set(gone) <= {*plan.assignments.values(), *plan.spares}
    return [node for node in nodes(names) if node.node_id not in gone]


def test_everyone_gets_a_slot_that_it_sees_in_whatever_order_they_join() -> None:
    assert held(plan_roles(nodes("1 0"), {}, 2, 0)) == "0 1"
    assert held(plan_roles(nodes("1a 1b 0a 0b"), {}, 2, 0)) == "0a 1a 0b 1b"
    assert held(plan_roles(nodes("12 2 0"), {}, 3, 0)) == "0 12 2"


def test_who_sees_everything_is_left_as_a_spare_for_any_slot() -> None:
    plan = plan_roles(nodes("w 0 1"), {}, 2, 1)
    assert (held(plan), plan.spares) == ("0 1", ("w",))
    for lost in ("0", "1"):
        after = plan_roles(without(plan, "w 0 1", lost), plan.assignments, 2, 1)
        assert held(after) == held(plan).replace(lost, "w")


def test_no_pipeline_is_begun_for_a_slot_that_nobody_sees() -> None:
    plan = plan_roles(nodes("0a 0b 0c"), {}, 2, 0)
    assert (plan.pipelines, plan.holes, plan.lacking) == ({}, (), (1,))
    assert plan.spares == ("0a", "0b", "0c")
    assert plan_roles(nodes("0a 0b w"), {}, 3, 0).lacking == (2,), "the one who could hold it holds another"


def test_too_few_nodes_lack_no_weights() -> None:
    plan = plan_roles(nodes("0"), {}, 2, 0)
    assert (plan.lacking, plan.detail) == ((), "1 of 2 stage nodes")


def test_a_further_pipeline_is_begun_only_where_it_will_be_whole() -> None:
    plan = plan_roles(nodes("0a 1a 0b 0c"), {}, 2, 0)
    assert (held(plan), plan.spares, plan.holes, plan.lacking) == ("0a 1a", ("0b", "0c"), (), (1,))
    assert held(plan_roles(nodes("0a 1a 0b 0c 1b"), plan.assignments, 2, 0)) == "0a 1a 0b 1b"


def test_a_spare_that_does_not_see_the_hole_leaves_it_and_one_that_does_fills_it() -> None:
    plan = plan_roles(nodes("0a 1a 0b"), {}, 2, 1)
    after = plan_roles(without(plan, "0a 1a 0b", "1a"), plan.assignments, 2, 1)
    assert (held(after), after.holes, after.lacking) == ("0a", (slot(0, 1),), (1,))
    joined = [*without(plan, "0a 1a 0b", "1a"), *nodes("- - - 1b")[3:]]
    assert held(plan_roles(joined, after.assignments, 2, 1)) == "0a 1b"


def test_a_holder_that_sees_everything_changes_its_slot_for_one_that_does_not() -> None:
    plan = plan_roles(nodes("w 1"), {}, 2, 0)
    assert held(plan) == "w 1"
    after = plan_roles([*without(plan, "w 1", "1"), *nodes("- - 0")[2:]], plan.assignments, 2, 0)
    assert held(after) == "0 w"


def test_of_two_that_could_change_places_the_newcomer_does() -> None:
    """12 has come first and got slot 1. It goes on to 2, which 01 does not see, and w stays where it serves."""
    assert held(plan_roles(nodes("w 12 01"), {slot(0, 0): NodeId("w")}, 3, 0)) == "w 01 12"


def test_two_pipelines_with_the_same_hole_wait_and_the_lower_one_is_filled_first() -> None:
    before = plan_roles(nodes("0a 1a 0b 1b"), {}, 2, 0)
    alive = without(before, "0a 1a 0b 1b", "1a", "1b")
    broken = plan_roles(alive, before.assignments, 2, 0)
    assert (held(broken), broken.holes) == ("0a 0b", (slot(0, 1), slot(1, 1)))
    after = plan_roles([*alive, *nodes("- - - - 1c")[4:]], broken.assignments, 2, 0)
    assert after.assignments == {slot(0, 0): "0a", slot(0, 1): "1c", slot(1, 0): "0b"}


def test_of_two_broken_pipelines_the_higher_one_gives_only_who_sees_the_hole() -> None:
    before = plan_roles(nodes("0a 1a 2a 0b 1b 2b"), {}, 3, 0)
    alive = without(before, "0a 1a 2a 0b 1b 2b", "2a", "1b")
    after = plan_roles(alive, before.assignments, 3, 0)
    assert after.assignments == {slot(0, 0): "0a", slot(0, 1): "1a", slot(0, 2): "2b", slot(1, 0): "0b"}


def test_where_the_highest_broken_pipeline_has_nobody_for_a_hole_another_gives() -> None:
    current = {slot(0, 0): NodeId("0a"), slot(1, 1): NodeId("1b"), slot(2, 0): NodeId("0c")}
    plan = plan_roles(nodes("0a 1b 0c"), current, 2, 0)
    assert plan.assignments == {slot(0, 0): "0a", slot(0, 1): "1b", slot(2, 0): "0c"}


def test_a_slot_that_its_holder_does_not_see_is_not_kept() -> None:
    plan = plan_roles(nodes("0 1"), {slot(0, 0): NodeId("1"), slot(0, 1): NodeId("0")}, 2, 0)
    assert held(plan) == "0 1"


def test_a_pipeline_is_of_a_class_that_sees_all_of_its_slots() -> None:
    assert held(plan_roles(nodes("0a 0b 0c 1c", classes="yyxx"), {}, 2, 0)) == "0c 1c"


def test_a_mirror_takes_its_slot_before_others_that_see_less() -> None:
    current = {slot(0, 0): NodeId("dead"), slot(0, 1): NodeId("1")}
    assert held(plan_roles(nodes("1 0 w"), current, 2, 1, {slot(0, 0): NodeId("w")})) == "w 1"
    assert held(plan_roles(nodes("1 0 w"), current, 2, 1)) == "0 1"


def is_one_possible(alive: list[ObservedStage], pp: int) -> bool:
    return any(
        all(node.can_hold(slot(0, index)) for index, node in enumerate(held)) for held in permutations(alive, pp)
    )


SEEN = (None, {0}, {1}, {2}, {0, 1}, {1, 2}, {0})


@settings(max_examples=250, deadline=None)
@given(
    data=st.data(),
    pp=st.integers(1, 3),
    spares=st.integers(0, 2),
    kinds=st.lists(st.sampled_from(SEEN), min_size=10, max_size=10),
    changes=st.lists(st.integers(0, 9), max_size=25),
)
def test_through_any_changes_nobody_holds_what_it_does_not_see_and_what_can_be_whole_is(
    data: st.DataObject, pp: int, spares: int, kinds: list[set[int] | None], changes: list[int]
) -> None:
    alive: dict[int, ObservedStage] = {}
    plan = plan_roles([], {}, pp, spares)
    for order, number in enumerate(changes):
        if number in alive:
            del alive[number]
        else:
            seen = kinds[number]
            alive[number] = ObservedStage(NodeId(f"n{number}"), "x", order, None if seen is None else frozenset(seen))
        before, shuffled = plan, data.draw(st.permutations(list(alive.values())))
        plan = plan_roles(shuffled, before.assignments, pp, spares)
        by_id = {node.node_id: node for node in alive.values()}
        assert sorted([*plan.assignments.values(), *plan.spares]) == sorted(by_id), "everyone has one place"
        assert all(by_id[node_id].can_hold(place) for place, node_id in plan.assignments.items())
        whole = [pipeline for pipeline, holders in plan.pipelines.items() if None not in holders]
        assert bool(whole) == is_one_possible(list(alive.values()), pp)
        for hole in plan.holes:
            assert not any(by_id[node_id].can_hold(hole) for node_id in plan.spares)
        was_whole = {p for p, holders in before.pipelines.items() if None not in holders and by_id.keys() >= {*holders}}
        for place, node_id in before.assignments.items():
            if place.pipeline in was_whole:
                assert plan.assignments[place] == node_id, "moved without need"
        assert plan_roles(shuffled, plan.assignments, pp, spares) == plan, "a second look changes something"
