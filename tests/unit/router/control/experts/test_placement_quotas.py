from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.control.experts.placement_quotas import level, level_groups, spread


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
