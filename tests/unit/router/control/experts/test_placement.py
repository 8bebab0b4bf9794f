from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CapacityError, ConfigurationError
from common.ids import NodeId
from common.topology import ShardId
from services.router.control.experts.placement import (
    ExpertNodeCapacity,
    Placement,
    level,
    level_groups,
    order_copies,
    place_shards,
    spread,
)

PLENTY = 10**12


def make_shards(num_layers: int, num_experts: int, num_slices: int = 1) -> list[ShardId]:
    return [ShardId(layer, e, s) for layer in range(num_layers) for e in range(num_experts) for s in range(num_slices)]


def make_nodes(num_nodes: int, num_hosts: int | None = None, capacity_bytes: int = PLENTY) -> list[ExpertNodeCapacity]:
    return [
        ExpertNodeCapacity(NodeId(f"n{i:02d}"), f"host{i % (num_hosts or num_nodes)}", capacity_bytes, "cpu")
        for i in range(num_nodes)
    ]


def counts_by_layer(placement: Placement, nodes: Sequence[ExpertNodeCapacity]) -> dict[int, list[int]]:
    counts: dict[int, Counter[NodeId]] = {}
    for shard, owners in placement.owners.items():
        counts.setdefault(shard.layer, Counter()).update(owners)
    return {layer: [counter[node.node_id] for node in nodes] for layer, counter in counts.items()}


def num_loads(placement: Placement, current: Mapping[NodeId, frozenset[ShardId]]) -> int:
    """Shards that have to be loaded."""
    return sum(len(shards - current.get(node, frozenset())) for node, shards in placement.shards_of().items())


def spread_of(values: Sequence[int]) -> int:
    return max(values) - min(values)


@pytest.mark.parametrize(("num_nodes", "num_hosts"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 1), (6, 3), (7, 7)])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_every_layer_and_the_whole_are_even(num_nodes: int, num_hosts: int, copies: int) -> None:
    nodes = make_nodes(num_nodes, num_hosts)
    placement = place_shards(make_shards(5, 12), 100, nodes, copies, {})
    assert {len(owners) for owners in placement.owners.values()} == {min(copies, num_nodes)}
    by_layer = counts_by_layer(placement, nodes)
    assert max(map(spread_of, by_layer.values())) <= 1
    assert spread_of([sum(column) for column in zip(*by_layer.values(), strict=True)]) <= 1
    assert placement.missing_copies == 60 * max(0, copies - num_nodes)


def test_primaries_are_even_too() -> None:
    nodes = make_nodes(5)
    placement = place_shards(make_shards(6, 8), 100, nodes, 2, {})
    by_layer = [
        Counter(owners[0] for shard, owners in placement.owners.items() if shard.layer == layer) for layer in range(6)
    ]
    for counts in by_layer:
        assert spread_of([counts[node.node_id] for node in nodes]) <= 1
    assert spread_of([sum(counts[node.node_id] for counts in by_layer) for node in nodes]) <= 1


def test_copies_go_to_different_hosts() -> None:
    nodes = make_nodes(6, 3)
    hosts = {node.node_id: node.host_label for node in nodes}
    placement = place_shards(make_shards(3, 16), 100, nodes, 2, {})
    for owners in placement.owners.values():
        assert len({hosts[owner] for owner in owners}) == 2


def test_host_that_is_alone_against_several_takes_a_copy_of_everything() -> None:
    nodes = [*make_nodes(3, 1), ExpertNodeCapacity(NodeId("far"), "other", PLENTY, "cpu")]
    placement = place_shards(make_shards(2, 9), 100, nodes, 2, {})
    assert all("far" in owners for owners in placement.owners.values())


def test_copies_share_a_host_where_the_other_has_no_room() -> None:
    nodes = [*make_nodes(2, 1), ExpertNodeCapacity(NodeId("far"), "other", 250, "cpu")]
    placement = place_shards(make_shards(1, 8), 100, nodes, 2, {})
    assert placement.missing_copies == 0
    assert sum("far" in owners for owners in placement.owners.values()) == 2


def test_copies_prefer_the_numeric_class_of_the_first() -> None:
    nodes = [
        ExpertNodeCapacity(NodeId(f"n{i}"), "host", PLENTY, numeric_class)
        for i, numeric_class in enumerate(("cpu", "gpu", "cpu", "gpu"))
    ]
    classes = {node.node_id: node.numeric_class for node in nodes}
    placement = place_shards(make_shards(2, 8), 100, nodes, 2, {})
    same = [len({classes[owner] for owner in owners}) == 1 for owners in placement.owners.values()]
    assert all(same)


def test_slices_of_one_expert_are_placed_as_shards() -> None:
    nodes = make_nodes(2)
    placement = place_shards(make_shards(1, 3, num_slices=2), 100, nodes, 1, {})
    assert len(placement.owners) == 6
    assert spread_of(counts_by_layer(placement, nodes)[0]) == 0


def test_small_node_takes_what_it_can_of_every_layer() -> None:
    nodes = [*make_nodes(2), ExpertNodeCapacity(NodeId("small"), "other", 400, "cpu")]
    placement = place_shards(make_shards(4, 8), 100, nodes, 1, {})
    for counts in counts_by_layer(placement, nodes).values():
        assert counts[2] == 1
        assert spread_of(counts[:2]) <= 1


def test_first_copies_come_before_second_ones_when_room_is_short() -> None:
    nodes = make_nodes(3, capacity_bytes=1000)
    placement = place_shards(make_shards(2, 12), 100, nodes, 2, {})
    assert Counter(map(len, placement.owners.values())) == {1: 18, 2: 6}
    assert placement.missing_copies == 18


def test_too_little_room_is_an_error_with_the_bytes() -> None:
    with pytest.raises(CapacityError, match="need 1200 bytes and 2 expert nodes offer 1000: 200 bytes are missing"):
        place_shards(make_shards(1, 12), 100, make_nodes(2, capacity_bytes=500), 1, {})
    with pytest.raises(CapacityError, match="0 expert nodes offer 0"):
        place_shards(make_shards(1, 12), 100, [], 1, {})


def test_shard_larger_than_every_node_is_an_error() -> None:
    with pytest.raises(CapacityError, match="expert shard of 150 bytes fits no node"):
        place_shards(make_shards(1, 2), 150, make_nodes(4, capacity_bytes=100), 1, {})


def test_no_copies_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigurationError, match="COPIES is 0"):
        place_shards(make_shards(1, 1), 100, make_nodes(1), 0, {})


def test_nothing_moves_while_nothing_changes() -> None:
    shards, nodes = make_shards(4, 10), make_nodes(5, 3)
    placement = place_shards(shards, 100, nodes, 2, {})
    assert place_shards(shards, 100, nodes, 2, placement.shards_of()) == placement


@pytest.mark.parametrize("num_hosts", [1, 4, 8])
def test_lost_node_costs_only_what_it_held(num_hosts: int) -> None:
    shards, nodes = make_shards(6, 32), make_nodes(8, num_hosts)
    current = place_shards(shards, 100, nodes, 2, {}).shards_of()
    after = place_shards(shards, 100, nodes[:-1], 2, current)
    lost = len(current[nodes[-1].node_id])
    assert lost <= num_loads(after, current) <= 1.1 * lost
    assert max(map(spread_of, counts_by_layer(after, nodes[:-1]).values())) <= 1


def test_joiner_gets_its_fair_share_and_nobody_else_loads() -> None:
    shards, nodes = make_shards(6, 32), make_nodes(8)
    current = place_shards(shards, 100, nodes[:-1], 2, {}).shards_of()
    after = place_shards(shards, 100, nodes, 2, current)
    assert len(after.shards_of()[nodes[-1].node_id]) == 48
    assert num_loads(after, current) == 48


def test_work_of_a_lost_node_falls_to_many() -> None:
    """Its shards' other copies are not all on one neighbour."""
    nodes = make_nodes(8)
    placement = place_shards(make_shards(1, 64), 100, nodes, 2, {})
    partners = Counter(owner for owners in placement.owners.values() if nodes[0].node_id in owners for owner in owners)
    del partners[nodes[0].node_id]
    assert len(partners) == 7


def test_order_of_arguments_does_not_matter() -> None:
    shards, nodes = make_shards(3, 7), make_nodes(5, 2)
    current = place_shards(shards, 100, nodes[:4], 2, {}).shards_of()
    expected = place_shards(shards, 100, nodes, 2, current)
    shuffle = random.Random(1).shuffle
    shuffle(shards)
    shuffle(nodes)
    assert place_shards(shards, 100, nodes, 2, dict(reversed(current.items()))) == expected


def test_a_large_mesh_is_planned_in_less_than_a_few_seconds() -> None:
    """The aim is 0.5 s on a free core; the limit here only catches another order of growth."""
    start_s = time.process_time()
    place_shards(make_shards(48, 128), 100, make_nodes(16), 2, {})
    assert time.process_time() - start_s < 3.0


@settings(max_examples=150, deadline=None)
@given(
    num_layers=st.integers(1, 4),
    num_experts=st.integers(1, 9),
    copies=st.integers(1, 3),
    nodes=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 40), st.sampled_from(["cpu", "gpu"])), min_size=1, max_size=6
    ),
    shard_bytes=st.integers(1, 3),
    randomness=st.randoms(use_true_random=False),
)
def test_whatever_is_given_limits_hold(
    num_layers: int,
    num_experts: int,
    copies: int,
    nodes: list[tuple[int, int, str]],
    shard_bytes: int,
    randomness: random.Random,
) -> None:
    shards = make_shards(num_layers, num_experts)
    capacities = [
        ExpertNodeCapacity(NodeId(f"n{number}"), f"host{host}", capacity, numeric_class)
        for number, (host, capacity, numeric_class) in enumerate(nodes)
    ]
    current = {
        NodeId(f"n{number}"): frozenset(randomness.sample(shards, randomness.randint(0, len(shards))))
        for number in range(len(nodes) + 1)
    }
    needed, offered = len(shards) * shard_bytes, sum(node.capacity_bytes for node in capacities)
    try:
        placement = place_shards(shards, shard_bytes, capacities, copies, current)
    except CapacityError:
        assert sum(node.capacity_bytes // shard_bytes for node in capacities) < len(shards)
        return
    assert needed <= offered
    assert set(placement.owners) == set(shards)
    limit_of = {node.node_id: node.capacity_bytes for node in capacities}
    for node_id, held in placement.shards_of().items():
        assert len(held) * shard_bytes <= limit_of[node_id]
    for owners in placement.owners.values():
        assert 1 <= len(owners) <= copies
        assert len(set(owners)) == len(owners)
    assert placement.missing_copies == sum(copies - len(owners) for owners in placement.owners.values())
    free = {n: limit_of[n] - len(placement.shards_of().get(n, ())) * shard_bytes for n in limit_of}
    for owners in placement.owners.values():
        if len(owners) < copies:
            assert all(free[n] < shard_bytes for n in limit_of if n not in owners), "a copy had room"


def test_level_is_as_even_as_sizes_allow() -> None:
    assert level(10, [2, 9, 9], [0, 0, 0]) == [2, 4, 4]
    assert level(100, [2, 9, 9], [0, 0, 0]) == [2, 9, 9]
    assert level(0, [2, 9], [0, 0]) == [0, 0]


def test_what_does_not_divide_goes_to_the_favoured() -> None:
    assert level(7, [9, 9, 9], [0, 5, 0]) == [2, 3, 2]


def test_group_takes_no_more_than_its_limit() -> None:
    assert level_groups(12, [[9, 9, 9], [9]], [[0, 0, 0], [0]], group_limit=6) == [[2, 2, 2], [6]]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.lists(st.integers(0, 15), min_size=1, max_size=6))
def test_level_pours_all_that_fits(total: int, caps: list[int]) -> None:
    quotas = level(total, caps, [0] * len(caps))
    assert sum(quotas) == min(total, sum(caps))
    assert all(0 <= quota <= cap for quota, cap in zip(quotas, caps, strict=True))
    highest = max(quotas)
    assert all(quota >= highest - 1 or quota == cap for quota, cap in zip(quotas, caps, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=5),
    st.lists(st.integers(0, 9), min_size=20, max_size=20),
)
def test_spread_keeps_both_sums_and_rounds_every_share(table: list[list[int]], current: list[int]) -> None:
    rows, columns = [sum(row) for row in table], [sum(column) for column in zip(*table, strict=True)]
    held = [current[4 * r : 4 * r + 4] for r in range(len(rows))]
    result = spread(rows, columns, columns, held)
    assert [sum(row) for row in result] == rows
    assert [sum(column) for column in zip(*result, strict=True)] == columns
    for row, counts in zip(rows, result, strict=True):
        for column, count in zip(columns, counts, strict=True):
            share = row * column / max(1, sum(rows))
            assert share - 1 < count < share + 1


def test_first_copies_move_along_a_chain_to_be_even() -> None:
    """Greedy alone would leave node 2 with none: its only shard looks as good on node 1."""
    owners = {ShardId(0, 0, 0): [1, 2], ShardId(0, 1, 0): [0, 1], ShardId(0, 2, 0): [0]}
    primaries = [nodes[0] for nodes in order_copies(owners, 3).values()]
    assert sorted(primaries) == [0, 1, 2]


def test_totals_even_out_over_layers() -> None:
    owners = {ShardId(layer, 0, 0): [0, 1] for layer in range(6)}
    assert Counter(nodes[0] for nodes in order_copies(owners, 2).values()) == {0: 3, 1: 3}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=20))
def test_owners_stay_the_same_and_no_single_swap_would_be_more_even(owner_sets: list[set[int]]) -> None:
    owners = {ShardId(number % 2, number, 0): sorted(nodes) for number, nodes in enumerate(owner_sets)}
    ordered = order_copies(owners, 5)
    assert {shard: sorted(nodes) for shard, nodes in ordered.items()} == owners
    for layer in range(2):
        counts = Counter(nodes[0] for shard, nodes in ordered.items() if shard.layer == layer)
        for shard, nodes in ordered.items():
            if shard.layer == layer:
                assert all(counts[nodes[0]] - counts[other] <= 1 for other in nodes[1:])
