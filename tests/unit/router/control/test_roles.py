from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.ids import NodeId, PipelineId, SlotIndex
from common.topology import CheckpointPart, LayerRange, StageSlot
from services.router.control.roles import (
    ObservedStage,
    RolePlan,
    describe_unfilled,
    loadable_slots,
    plan_roles,
)
from tests.support.router.mesh_shapes import node

LAYERS = [LayerRange(0, 3), LayerRange(3, 5), LayerRange(5, 7)]


def slot(pipeline: int, index: int) -> StageSlot:
    return StageSlot(PipelineId(pipeline), SlotIndex(index))


def nodes(names: str, classes: str | None = None) -> list[ObservedStage]:
    """One letter a node, in the order in which they joined."""
    return [
        ObservedStage(NodeId(name), (classes or "x" * len(names))[order], order) for order, name in enumerate(names)
    ]


def held(plan: RolePlan) -> str:
    """Holders by pipeline and index."""
    return "".join(plan.assignments.values())


@pytest.mark.parametrize(
    ("names", "pp", "spares", "holders", "left"),
    [
        ("ab", 2, 0, "ab", ""),
        ("abc", 2, 0, "ab", "c"),
        ("abcd", 2, 0, "abcd", ""),
        ("abcd", 2, 1, "ab", "cd"),
        ("abcde", 2, 1, "abcd", "e"),
        ("abc", 1, 2, "a", "bc"),
    ],
)
def test_number_of_pipelines_follows_the_rule(names: str, pp: int, spares: int, holders: str, left: str) -> None:
    plan = plan_roles(nodes(names), {}, pp, spares)
    assert (held(plan), "".join(plan.spares)) == (holders, left)
    assert len(plan.pipelines) == len(holders) // pp


def test_too_few_nodes_make_no_pipeline_and_the_detail_says_how_many_there_are() -> None:
    plan = plan_roles(nodes("a"), {}, 2, 0)
    assert (plan.pipelines, plan.assignments, plan.spares) == ({}, {}, ("a",))
    assert plan.detail == "1 of 2 stage nodes"


def test_first_pipeline_is_worth_more_than_a_spare() -> None:
    plan = plan_roles(nodes("ab"), {}, 2, 1)
    assert held(plan) == "ab"
    assert plan.detail == "2 stage nodes: 1 pipeline of 2, 0 spare of the 1 wanted"


def test_spare_fills_the_hole_and_nobody_else_moves() -> None:
    before = plan_roles(nodes("abcde"), {}, 2, 1)
    after = plan_roles([node for node in nodes("abcde") if node.node_id != "b"], before.assignments, 2, 1)
    assert held(after) == "aecd"
    assert after.holes == ()


def test_a_hole_stays_a_hole_while_nobody_is_free_for_it() -> None:
    before = plan_roles(nodes("abcdef"), {}, 2, 0)
    after = plan_roles([node for node in nodes("abcdef") if node.node_id != "a"], before.assignments, 2, 0)
    assert held(after) == "bcdef"
    assert after.holes == (slot(0, 0),)
    assert after.pipelines[PipelineId(0)] == (None, "b")
    assert "no node holds slot 0 of pipeline 0" in after.detail
    joined = [*(node for node in nodes("abcdefg") if node.node_id != "a")]
    assert held(plan_roles(joined, after.assignments, 2, 0)) == "gbcdef"


def test_of_two_broken_pipelines_the_higher_one_fills_the_lower_one() -> None:
    before = plan_roles(nodes("abcdef"), {}, 2, 0)
    after = plan_roles([node for node in nodes("abcdef") if node.node_id not in "ad"], before.assignments, 2, 0)
    assert held(after) == "cbef"
    assert after.holes == ()
    assert set(after.pipelines) == {0, 2}, "nobody is renumbered"


def test_a_pipeline_too_many_for_the_spares_is_kept_at_first_and_given_up_when_told() -> None:
    before = plan_roles(nodes("abcdef"), {}, 2, 2)
    assert held(before) == "abcd"
    remaining = nodes("abcd")
    kept = plan_roles(remaining, before.assignments, 2, 2)
    assert (held(kept), kept.spares, kept.num_surplus) == ("abcd", (), 1)
    given_up = plan_roles(remaining, kept.assignments, 2, 2, keeps_surplus=False)
    assert (held(given_up), given_up.spares, given_up.num_surplus) == ("ab", ("c", "d"), 0)
    last = plan_roles(nodes("ab"), before.assignments, 2, 2, keeps_surplus=False)
    assert (held(last), last.num_surplus) == ("ab", 0)


def test_of_pipelines_too_many_those_with_a_hole_are_given_up_first() -> None:
    before = plan_roles(nodes("abcdef"), {}, 2, 0)
    broken = plan_roles(nodes("abcdef")[1:], before.assignments, 2, 2, keeps_surplus=False)
    assert (held(broken), broken.holes, broken.spares) == ("cd", (), ("b", "e", "f"))
    assert broken.pipelines.keys() == {1}


def test_mirror_takes_the_slot_that_it_mirrors_and_others_leave_it_alone() -> None:
    before = plan_roles(nodes("abcd"), {}, 2, 2)
    alive = [node for node in nodes("abcd") if node.node_id != "a"]
    mirrors = {slot(0, 0): NodeId("d"), slot(0, 1): NodeId("c")}
    assert held(plan_roles(alive, before.assignments, 2, 2, mirrors)) == "db"
    assert held(plan_roles(alive, before.assignments, 2, 2, {slot(0, 1): NodeId("c")})) == "db"
    assert held(plan_roles(alive, before.assignments, 2, 2)) == "cb"


def test_joiner_completes_a_further_pipeline() -> None:
    before = plan_roles(nodes("abc"), {}, 2, 0)
    after = plan_roles(nodes("abcd"), before.assignments, 2, 0)
    assert held(after) == "abcd"


def test_pipeline_is_of_one_numeric_class_where_it_can_be() -> None:
    assert held(plan_roles(nodes("abcd", "xyxy"), {}, 2, 0)) == "acbd"


def test_hole_prefers_the_class_of_its_pipeline_and_takes_another_in_need() -> None:
    current = {slot(0, 0): NodeId("a"), slot(0, 1): NodeId("dead")}
    assert held(plan_roles(nodes("abc", "xyx"), current, 2, 0)) == "ac"
    assert held(plan_roles(nodes("ab", "xy"), current, 2, 0)) == "ab"


def test_slots_of_another_shape_are_not_kept() -> None:
    current = {slot(0, 0): NodeId("a"), slot(0, 1): NodeId("b"), slot(0, 2): NodeId("c")}
    assert held(plan_roles(nodes("abcd"), current, 2, 0)) == "abcd"


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(), pp=st.integers(1, 3), spares=st.integers(0, 2), changes=st.lists(st.integers(0, 11), max_size=25)
)
def test_through_any_changes_slots_are_whole_and_stable(
    data: st.DataObject, pp: int, spares: int, changes: list[int]
) -> None:
    alive: dict[int, ObservedStage] = {}
    plan = plan_roles([], {}, pp, spares)
    for order, number in enumerate(changes):
        if number in alive:
            del alive[number]
        else:
            alive[number] = ObservedStage(NodeId(f"n{number}"), "xy"[number % 2], order)
        before, shuffled = plan, data.draw(st.permutations(list(alive.values())))
        plan = plan_roles(shuffled, before.assignments, pp, spares)
        names = {node.node_id for node in alive.values()}
        holders = list(plan.assignments.values())
        assert sorted([*holders, *plan.spares]) == sorted(names), "everyone has one place"
        assert {len(holders) for holders in plan.pipelines.values()} <= {pp}
        broken = {hole.pipeline for hole in plan.holes}
        assert len(broken) <= 1, "two broken pipelines could be one whole one"
        assert not (broken and plan.spares), "a hole stays while somebody is free"
        if len(names) >= pp:
            assert len(plan.pipelines) >= 1
            assert (len(names) - spares) // pp <= len(plan.pipelines)
        for kept, node_id in before.assignments.items():
            if (
                node_id in names
                and kept.pipeline not in {hole.pipeline for hole in before.holes}
                and all(
                    before.assignments[other] in names
                    for other in before.assignments
                    if other.pipeline == kept.pipeline
                )
            ):
                assert plan.assignments[kept] == node_id, "moved without need"
        assert plan_roles(shuffled, plan.assignments, pp, spares) == plan, "a second look changes something"


def on_hosts(names: str) -> list[ObservedStage]:
    """`a1 b1`: a host's letter and a number, in the order in which they joined."""
    return [ObservedStage(NodeId(name), "x", order, host_label=name[0]) for order, name in enumerate(names.split())]


@pytest.mark.parametrize(
    ("names", "spares", "pipelines"),
    [
        ("a1 b1 a2 b2", 0, [("a1", "a2"), ("b1", "b2")]),
        ("a1 b1 a2 b2", 2, [("a1", "a2")]),
        ("a1 b1 b2 c1", 0, [("b1", "b2"), ("a1", "c1")]),
        ("a1 a2 a3 b1", 0, [("a1", "a2"), ("b1", "a3")]),
        ("a1 b1 c1 d1", 0, [("a1", "b1"), ("c1", "d1")]),
    ],
)
def test_a_host_has_slots_of_one_pipeline_as_far_as_there_are_hosts(
    names: str, spares: int, pipelines: list[tuple[str, str]]
) -> None:
    plan = plan_roles(on_hosts(names), {}, 2, spares)
    assert list(plan.pipelines.values()) == pipelines


def test_a_hole_is_filled_from_a_host_that_no_other_pipeline_is_on() -> None:
    before = {slot(0, 0): NodeId("a1"), slot(0, 1): NodeId("a2"), slot(1, 0): NodeId("b1")}
    plan = plan_roles(on_hosts("a1 a2 b1 a3 b2"), before, 2, 0)
    assert plan.pipelines[PipelineId(1)] == ("b1", "b2")


def test_mirrors_take_over_a_pipeline_that_has_lost_all_its_holders() -> None:
    before = {slot(0, 0): NodeId("a"), slot(0, 1): NodeId("b"), slot(1, 0): NodeId("c"), slot(1, 1): NodeId("d")}
    mirrors = {slot(1, 0): NodeId("h"), slot(1, 1): NodeId("g")}
    plan = plan_roles([one for one in nodes("abcdefgh") if one.node_id not in "cd"], before, 2, 2, mirrors)
    assert held(plan) == "abhg"


def test_a_pipeline_that_has_lost_all_its_holders_is_of_its_mirrors_class() -> None:
    before = {slot(0, 0): NodeId("a"), slot(0, 1): NodeId("b")}
    observed = [one for one in nodes("abcdef", "xxyyxx") if one.node_id not in "ab"]
    assert held(plan_roles(observed, before, 2, 2, {slot(0, 0): NodeId("f")})) == "fe"


def test_a_complete_mirror_takes_its_slot_whatever_its_host() -> None:
    before = {slot(0, 1): NodeId("a2"), slot(1, 0): NodeId("b1"), slot(1, 1): NodeId("b2")}
    plan = plan_roles(on_hosts("a2 b1 b2 a3 b3"), before, 2, 0, {slot(0, 0): NodeId("b3")})
    assert plan.pipelines[PipelineId(0)] == ("b3", "a2")


@pytest.mark.parametrize(
    ("seen", "slots"),
    [((0, 3), {0}), ((0, 7), {0, 1, 2}), ((0, 6), {0, 1}), ((1, 7), {1, 2}), ((3, 4), set()), (None, set())],
    ids=str,
)
def test_a_node_can_hold_slots_that_lie_in_what_it_sees(seen: tuple[int, int] | None, slots: set[int]) -> None:
    part = CheckpointPart(LayerRange(*seen) if seen is not None else None)
    assert loadable_slots(node("a", part=part), LAYERS) == frozenset(slots)


def test_who_sees_the_whole_can_hold_every_slot_but_those_that_are_too_large() -> None:
    assert loadable_slots(node("a"), LAYERS) is None
    assert loadable_slots(node("a"), LAYERS, {1}) == frozenset({0, 2})


def test_each_slot_that_stays_empty_is_named_by_its_layers_and_by_who_could() -> None:
    nodes = [node("a", part=CheckpointPart(LayerRange(0, 5)))]
    assert describe_unfilled([], LAYERS, nodes) == ""
    assert describe_unfilled([1, 2], LAYERS, nodes) == (
        "; no other node has the weights of layers [3, 5); no node has the weights of layers [5, 7)"
    )
