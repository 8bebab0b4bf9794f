"""Expert shards where nodes see the weights of some experts only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CapacityError
from common.ids import NodeId
from common.topology import ShardId
from compose.part_plan import deal_experts
from services.router.control.experts.placement import ExpertNodeCapacity, place_shards
from services.router.control.experts.placing import describe_unseen, unseen_experts

PLENTY = 10**6


def make_shards(num_layers: int, num_experts: int) -> list[ShardId]:
    return [ShardId(layer, expert, 0) for layer in range(num_layers) for expert in range(num_experts)]


def node(name: str, experts: Sequence[int] | None, capacity_bytes: int = PLENTY) -> ExpertNodeCapacity:
    seen = None if experts is None else frozenset(experts)
    return ExpertNodeCapacity(NodeId(name), f"host of {name}", capacity_bytes, "cpu", seen)


def experts_of(held: frozenset[ShardId]) -> set[int]:
    return {shard.expert for shard in held}


@pytest.mark.parametrize(("num_experts", "num_folders", "copies"), [(8, 3, 2), (12, 4, 2), (7, 3, 1), (64, 8, 2)])
def test_folders_as_they_are_written_are_held_whole(num_experts: int, num_folders: int, copies: int) -> None:
    dealt = deal_experts(num_experts, num_folders, copies)
    nodes = [node(f"n{number}", sorted(experts)) for number, experts in enumerate(dealt)]
    placement = place_shards(make_shards(3, num_experts), 1, nodes, copies, {})
    assert placement.missing_copies == 0
    held = placement.shards_of()
    assert [experts_of(held[own.node_id]) for own in nodes] == [set(experts) for experts in dealt]


def test_nodes_with_the_same_folder_share_its_experts() -> None:
    nodes = [node(f"{name}{number}", part) for name, part in (("a", range(6)), ("b", range(6, 12))) for number in "12"]
    held = place_shards(make_shards(2, 12), 1, nodes, 1, {}).shards_of()
    assert {len(shards) for shards in held.values()} == {6}
    assert experts_of(held[NodeId("a1")]) | experts_of(held[NodeId("a2")]) == set(range(6))


def test_a_node_with_the_whole_takes_what_the_others_do_not_see() -> None:
    nodes = [node("part", range(4)), node("whole", None)]
    placement = place_shards(make_shards(2, 8), 1, nodes, 2, {})
    held = placement.shards_of()
    assert experts_of(held[NodeId("part")]) == set(range(4))
    assert experts_of(held[NodeId("whole")]) == set(range(8))
    assert placement.missing_copies == 8


def test_what_a_node_holds_and_does_not_see_any_more_moves_on() -> None:
    nodes = [node("a", [0]), node("b", None)]
    current = {NodeId("a"): frozenset(make_shards(1, 2))}
    placement = place_shards(make_shards(1, 2), 1, nodes, 1, current)
    assert placement.owners == {ShardId(0, 0, 0): ("a",), ShardId(0, 1, 0): ("b",)}


def test_a_full_node_passes_on_what_others_see_for_what_it_alone_sees() -> None:
    """Who is full by its quota hands on along a chain: 0 pushes 2 off a, and 2 pushes 1 off c, which b takes."""
    nodes = [
        ExpertNodeCapacity(NodeId("a"), "host", 1, "cpu", frozenset({0, 1, 2})),
        ExpertNodeCapacity(NodeId("b"), "host", 3, "cpu", frozenset({1})),
        ExpertNodeCapacity(NodeId("c"), "another", 1, "cpu", frozenset({1, 2})),
    ]
    placement = place_shards(make_shards(1, 3), 1, nodes, 2, {})
    assert [placement.owners[shard] for shard in make_shards(1, 3)] == [("a",), ("b",), ("c",)]


def test_further_copies_give_way_to_what_only_their_node_sees() -> None:
    nodes = [node("a", [0, 1, 2], 3), node("b", [0, 1], 3)]
    placement = place_shards(make_shards(1, 3), 1, nodes, 2, {})
    assert placement.owners[ShardId(0, 2, 0)] == ("a",)
    assert placement.missing_copies == 1


def test_too_little_room_on_those_who_see_it_is_an_error_with_the_bytes() -> None:
    nodes = [node("a", [0, 1], 10), node("b", [2], 1000)]
    with pytest.raises(CapacityError, match=r"of 10 bytes fits no node: .* 1 nodes that see its weights offer 10,"):
        place_shards(make_shards(1, 3), 10, nodes, 1, {})


def test_first_copies_are_even_over_those_who_see_them() -> None:
    nodes = [node(f"n{number}", sorted(held)) for number, held in enumerate(deal_experts(12, 4, 2))]
    placement = place_shards(make_shards(4, 12), 1, nodes, 2, {})
    counts = Counter(owners[0] for owners in placement.owners.values())
    assert set(counts.values()) == {12}


def can_hold_everything(shards: Sequence[ShardId], nodes: Sequence[ExpertNodeCapacity]) -> bool:
    """By augmenting paths from shard to shard, as plainly as can be."""
    holder: dict[ShardId, int] = {}

    def place(shard: ShardId, seen: set[int]) -> bool:
        for index, own in enumerate(nodes):
            if index in seen or (own.experts is not None and shard.expert not in own.experts):
                continue
            seen.add(index)
            held = [other for other, at in holder.items() if at == index]
            if len(held) < own.capacity_bytes or any(place(other, seen) for other in held):
                holder[shard] = index
                return True
        return False

    return all(place(shard, set()) for shard in shards)


@settings(max_examples=300, deadline=None)
@given(
    num_layers=st.integers(1, 3),
    num_experts=st.integers(1, 6),
    copies=st.integers(1, 3),
    parts=st.lists(
        st.tuples(st.none() | st.frozensets(st.integers(0, 5), max_size=6), st.integers(0, 14), st.integers(0, 2)),
        min_size=1,
        max_size=5,
    ),
    data=st.data(),
)
def test_every_shard_has_an_owner_that_sees_it_if_any_arrangement_allows_it(
    num_layers: int,
    num_experts: int,
    copies: int,
    parts: list[tuple[frozenset[int] | None, int, int]],
    data: st.DataObject,
) -> None:
    shards = make_shards(num_layers, num_experts)
    nodes = [
        ExpertNodeCapacity(NodeId(f"n{number}"), f"host{host}", room, "cpu", experts)
        for number, (experts, room, host) in enumerate(parts)
    ]
    current = {own.node_id: data.draw(st.frozensets(st.sampled_from(shards))) for own in nodes}
    try:
        placement = place_shards(shards, 1, nodes, copies, current)
    except CapacityError:
        assert not can_hold_everything(shards, nodes)
        return
    held = placement.shards_of()
    free = {own.node_id: own.capacity_bytes - len(held.get(own.node_id, ())) for own in nodes}
    assert min(free.values()) >= 0
    assert placement.missing_copies == sum(copies - len(owners) for owners in placement.owners.values())
    for shard, owners in placement.owners.items():
        able = {own.node_id for own in nodes if own.experts is None or shard.expert in own.experts}
        assert 1 <= len(set(owners)) == len(owners) <= copies
        assert able.issuperset(owners)
        if len(owners) < copies:
            assert all(not free[name] for name in able.difference(owners)), "a copy had room"


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
