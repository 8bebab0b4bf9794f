from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.control.matching import fill


def test_items_go_to_the_emptiest_bin() -> None:
    held = [[0, 0], [0, 0], [0, 0]]
    fill(held, [1, 1, 1], [1, 2], [[1, 1]] * 3)
    assert held == [[0, 1], [1, 0], [0, 1]]


def test_preferred_bin_comes_first_while_it_has_room() -> None:
    held = [[0, 0], [0, 0]]
    fill(held, [1, 1], [1, 5], [[1, 1]] * 2, preference=lambda item, bin_index: bin_index)
    assert held == [[1, 0], [0, 1]]


def test_others_move_on_where_only_that_makes_room() -> None:
    held = [[1, 0], [0, 0]]
    fill(held, [0, 1], [0, 1], [[1, 1], [1, 0]])  # item 1 may only be in bin 0
    assert held == [[0, 1], [1, 0]]


def test_what_finds_no_room_is_left_over() -> None:
    held, needed = [[0], [0]], [1, 1]
    fill(held, needed, [1], [[1], [1]])
    assert (held, needed) == ([[1], [0]], [0, 1])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), num_items=st.integers(1, 6), num_bins=st.integers(1, 4))
def test_every_matching_that_exists_is_found(data: st.DataObject, num_items: int, num_bins: int) -> None:
    """Degrees are read off a matching that exists; filling from nothing finds one as large."""
    row = st.lists(st.integers(0, 2), min_size=num_bins, max_size=num_bins)
    solution = data.draw(st.lists(row, min_size=num_items, max_size=num_items))
    slack = data.draw(st.lists(row, min_size=num_items, max_size=num_items))
    limits = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(solution, slack, strict=True)]
    needed, room = [sum(counts) for counts in solution], [sum(column) for column in zip(*solution, strict=True)]
    held = [[0] * num_bins for _ in range(num_items)]
    totals, sizes = list(needed), list(room)
    fill(held, needed, room, limits)
    assert not any(needed)
    assert not any(room)
    assert [sum(counts) for counts in held] == totals
    assert [sum(column) for column in zip(*held, strict=True)] == sizes
    assert all(0 <= h <= m for x, y in zip(held, limits, strict=True) for h, m in zip(x, y, strict=True))
