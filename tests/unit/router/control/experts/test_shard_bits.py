"""Tables of bits give what tables of truth values would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.wire.array import BoolArray, Int32Array
from services.router.control.experts.shard_bits import (
    NOBODY,
    are_in,
    by_shard,
    count,
    from_pairs,
    pack,
    pairs,
    stack,
    unpack,
)


@st.composite
def tables(draw: st.DrawFn) -> BoolArray:
    """Up to four nodes, and numbers of shards on both sides of a byte and of a word."""
    num_nodes, num_shards = draw(st.integers(0, 4)), draw(st.sampled_from([1, 7, 8, 12, 63, 64, 65, 130]))
    rows = [draw(st.lists(st.booleans(), min_size=num_shards, max_size=num_shards)) for _ in range(num_nodes)]
    return np.array(rows, dtype=np.bool_).reshape(num_nodes, num_shards)


@settings(max_examples=200, deadline=None)
@given(tables())
def test_bits_say_the_same_as_truth_values(table: BoolArray) -> None:
    num_nodes, num_shards = table.shape
    bits = pack(table)
    assert np.array_equal(unpack(bits, num_shards), table)
    assert np.array_equal(stack(list(bits), num_shards), bits)
    assert count(bits).tolist() == table.sum(axis=1).tolist()
    nodes, shards = pairs(bits)
    assert (nodes.tolist(), shards.tolist()) == tuple(part.tolist() for part in np.nonzero(table))
    again = from_pairs(nodes.astype(np.int32), shards.astype(np.int32), num_nodes, num_shards)
    assert np.array_equal(again, bits)
    owners = by_shard(nodes, shards, num_shards)
    assert len(owners) >= 1
    for shard, column in enumerate(owners.T.tolist()):
        holders = np.flatnonzero(table[:, shard]).tolist()
        assert column == holders + [NOBODY] * (len(column) - len(holders))


@settings(max_examples=200, deadline=None)
@given(tables(), st.data())
def test_who_has_the_shard_of_a_column_is_found_and_nobody_has_none(table: BoolArray, data: st.DataObject) -> None:
    num_nodes, num_shards = table.shape
    columns = st.lists(st.integers(NOBODY, num_nodes - 1), min_size=num_shards, max_size=num_shards)
    nodes: Int32Array = np.array([data.draw(columns), data.draw(columns)], dtype=np.int32)
    expected = [[node != NOBODY and bool(table[node, at]) for at, node in enumerate(row)] for row in nodes.tolist()]
    assert are_in(pack(table), nodes).tolist() == expected


@pytest.mark.parametrize("num_shards", [12, 65])
def test_there_is_nothing_beyond_the_last_shard(num_shards: int) -> None:
    assert count(pack(np.ones((2, num_shards), dtype=np.bool_))).tolist() == [num_shards, num_shards]
