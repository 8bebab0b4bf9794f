from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from common.topology import ShardId
from services.router.control.experts.primaries import order_copies


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
