"""Rows of several calls, sorted by shard."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.wire.array import Int32Array
from services.expert.calls import group_rows

ROUTINGS = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=8),
    min_size=1,
    max_size=4,
)


def routing_of(rows: list[tuple[int, int, int]]) -> Int32Array:
    return np.array(rows, dtype=np.int32).T


@settings(deadline=None)
@given(calls=ROUTINGS)
def test_every_row_is_in_the_group_of_its_shard_once(calls: list[list[tuple[int, int, int]]]) -> None:
    grouping = group_rows([routing_of(rows) for rows in calls], 3)
    keys = [expert * 3 + piece for rows in calls for _, expert, piece in rows]
    order = list(range(len(keys))) if grouping.order is None else grouping.order.tolist()
    assert sorted(order) == list(range(len(keys)))
    assert list(grouping.keys) == sorted(set(keys))
    assert grouping.offsets[0] == 0
    assert grouping.offsets[-1] == len(keys)
    for group, key in enumerate(grouping.keys):
        members = order[grouping.offsets[group] : grouping.offsets[group + 1]]
        assert members == [row for row, own in enumerate(keys) if own == key], "in the order in which they came"


@settings(deadline=None)
@given(calls=ROUTINGS)
def test_rows_that_stand_in_order_are_known_to(calls: list[list[tuple[int, int, int]]]) -> None:
    keys = [expert * 3 + piece for rows in calls for _, expert, piece in rows]
    assert (group_rows([routing_of(rows) for rows in calls], 3).order is None) == (keys == sorted(keys))


def test_no_rows_are_no_groups() -> None:
    grouping = group_rows([np.zeros((3, 0), dtype=np.int32)], 1)
    assert (grouping.keys, grouping.offsets) == ((), (0,))
