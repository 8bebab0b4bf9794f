from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from common.ids import NodeId
from common.topology import ShardId
from services.router.control.experts.placement import ExpertNodeCapacity, Placement, place_shards
from tests.support.router.former_roll_out import former_assignment, next_assignment

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
X, Y, Z = ShardId(0, 0, 0), ShardId(0, 1, 0), ShardId(0, 2, 0)


def test_shard_stays_until_its_new_owner_is_ready() -> None:
    target = Placement({X: (B,)}, 0)
    before = next_assignment(target, {A: frozenset({X}), B: frozenset()}, {A: frozenset({X})})
    assert before.shards == {A: {X}, B: {X}}
    assert before.owners == {X: (A,)}
    assert not before.is_complete
    after = next_assignment(target, {A: frozenset({X}), B: frozenset({X})}, before.shards)
    assert after.shards == {A: frozenset(), B: {X}}
    assert after.owners == {X: (B,)}
    done = next_assignment(target, {A: frozenset(), B: frozenset({X})}, after.shards)
    assert done.is_complete


def test_ready_copies_are_asked_in_the_order_of_the_placement() -> None:
    target = Placement({X: (C, A, B)}, 0)
    ready = {A: frozenset({X}), B: frozenset({X}), C: frozenset[ShardId]()}
    assert next_assignment(target, ready, ready).owners == {X: (A, B)}


def test_full_node_gives_up_a_copy_that_another_keeps() -> None:
    target = Placement({X: (B, C), Y: (A,)}, 0)
    ready = {A: frozenset({X}), B: frozenset({X}), C: frozenset[ShardId]()}
    step = next_assignment(target, ready, ready, capacity_bytes={A: 1, B: 1, C: 1}, shard_bytes=1)
    assert step.shards == {A: {Y}, B: {X}, C: {X}}


def test_full_node_never_gives_up_the_last_copy() -> None:
    target = Placement({X: (B,), Y: (A,)}, 0)
    ready = {A: frozenset({X}), B: frozenset({Y})}
    step = next_assignment(target, ready, ready, capacity_bytes={A: 1, B: 1}, shard_bytes=1)
    assert step.shards == ready
    assert step.owners == {X: (A,), Y: (B,)}


def test_orphans_are_loaded_first() -> None:
    target = Placement({X: (A,), Y: (A, B)}, 0)
    ready = {A: frozenset({Z}), B: frozenset({Y})}
    step = next_assignment(
        Placement({**target.owners, Z: (A, B)}, 0), ready, ready, capacity_bytes={A: 2, B: 2}, shard_bytes=1
    )
    assert step.shards[A] == {Z, X}
    assert step.orphans() == (X,)


def test_shard_of_no_model_is_dropped() -> None:
    step = next_assignment(Placement({X: (A,)}, 0), {A: frozenset({X, Y})}, {A: frozenset({X, Y})})
    assert step.shards == {A: {X}}


@settings(max_examples=60, deadline=None)
@given(randomness=st.randoms(use_true_random=False), copies=st.integers(1, 2), slack=st.integers(0, 6))
def test_rebalancing_never_leaves_a_shard_without_a_ready_copy(
    randomness: random.Random, copies: int, slack: int
) -> None:
    shards = [ShardId(layer, expert, 0) for layer in range(2) for expert in range(6)]

    def nodes_of(number: int) -> list[ExpertNodeCapacity]:
        capacity = -(-len(shards) * copies // number) + slack
        return [ExpertNodeCapacity(NodeId(f"n{i}"), f"h{i}", capacity, "cpu") for i in range(number)]

    old_nodes, new_nodes = nodes_of(randomness.randint(2, 4)), nodes_of(randomness.randint(2, 5))
    capacity_bytes: dict[NodeId, int] = {}
    for node in [*old_nodes, *new_nodes]:
        capacity_bytes[node.node_id] = max(capacity_bytes.get(node.node_id, 0), node.capacity_bytes)
    ready = place_shards(shards, 1, old_nodes, copies, {}).shards_of()
    ready |= {node.node_id: frozenset() for node in new_nodes if node.node_id not in ready}
    target = place_shards(shards, 1, new_nodes, copies, ready)
    current = ready
    for _ in range(200):
        step = next_assignment(target, ready, current, capacity_bytes, 1)
        current = dict(step.shards)
        if step.is_complete:
            break
        assert step.orphans() == ()
        for node_id, held in current.items():
            assert len(held) <= max(capacity_bytes[node_id], len(ready[node_id]))
        ready = {node_id: ready[node_id] & held for node_id, held in current.items()}  # unloads come at once
        assert set().union(*ready.values()) == set(shards), "a shard is gone"
        loading = sorted((node_id, shard) for node_id, held in current.items() for shard in held - ready[node_id])
        if loading:  # one node has loaded one thing
            node_id, shard = randomness.choice(loading)
            ready[node_id] |= {shard}
    if slack:
        assert step.is_complete


NODES, SHARDS = [NodeId(name) for name in "abcd"], [ShardId(0, expert, 0) for expert in range(8)]
some_shards = st.frozensets(st.sampled_from(SHARDS))


@settings(max_examples=300, deadline=None)
@given(
    owners=st.fixed_dictionaries(
        {shard: st.lists(st.sampled_from(NODES), unique=True, min_size=1) for shard in SHARDS}
    ),
    ready=st.fixed_dictionaries({node: some_shards for node in NODES}),
    told=st.fixed_dictionaries({node: some_shards for node in NODES}),
    capacities=st.none() | st.fixed_dictionaries({node: st.integers(0, 30) for node in NODES}),
)
def test_tables_give_the_same_step_as_sets_did(
    owners: dict[ShardId, list[NodeId]],
    ready: dict[NodeId, frozenset[ShardId]],
    told: dict[NodeId, frozenset[ShardId]],
    capacities: dict[NodeId, int] | None,
) -> None:
    target = Placement({shard: tuple(nodes) for shard, nodes in owners.items()}, 0)
    expected = former_assignment(target, ready, told, capacities, 3)
    assert next_assignment(target, ready, told, capacities, 3) == expected


def test_nothing_is_unloaded_that_a_node_was_to_hold_that_is_gone() -> None:
    target = Placement({X: (B, C)}, 0)
    ready = {A: frozenset({X}), B: frozenset({X})}
    assert next_assignment(target, ready, ready).shards == ready
