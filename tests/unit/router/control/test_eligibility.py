"""Who can take which role, and the words for a role that nobody can take."""

from __future__ import annotations

import pytest

from common.topology import CheckpointPart, LayerRange
from services.router.control.eligibility import describe_unfilled, describe_unseen, loadable_slots, unseen_experts
from tests.support.router.mesh_shapes import node

LAYERS = [LayerRange(0, 3), LayerRange(3, 5), LayerRange(5, 7)]


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
        "; nobody else has the weights of layers [3, 5); nobody has the weights of layers [5, 7)"
    )


def test_experts_are_unseen_where_all_nodes_see_parts_and_none_sees_them() -> None:
    parts = [frozenset({0, 2}), frozenset({2, 3})]
    assert unseen_experts(parts, 6) == (1, 4, 5)
    assert unseen_experts([*parts, None], 6) == ()
    assert unseen_experts([], 6) == (), "without nodes nothing is said of weights"


@pytest.mark.parametrize(
    ("experts", "words"),
    [((3,), "expert 3"), ((3, 5), "experts 3, 5"), (tuple(range(11)), "experts 0, 1, 2, 3, 4, 5, 6, 7 and 3 more")],
)
def test_experts_that_nobody_sees_are_named_as_far_as_they_are_few(experts: tuple[int, ...], words: str) -> None:
    assert describe_unseen(experts) == f"no expert node has the weights of {words}"
