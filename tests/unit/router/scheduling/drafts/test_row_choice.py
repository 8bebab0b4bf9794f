"""How many drafts a step gets, with plain numbers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.scheduling.drafts.row_choice import MARGIN, choose_rows
from tests.unit.router.scheduling.drafts.shapes import BENCH


def gains(rate: float, count: int = 15) -> list[float]:
    return [rate**place for place in range(1, count + 1)]


def choose(*by_sequence: list[float], most: int = 500) -> list[int]:
    return choose_rows(len(by_sequence), by_sequence, most, BENCH.relative_time(len(by_sequence)), BENCH.relative_time)


@pytest.mark.parametrize(("rate", "count"), [(0.2, 0), (0.4, 0), (0.95, 15)])
def test_one_stream_drafts_nothing_at_a_low_rate_and_all_it_may_at_a_high_one(rate: float, count: int) -> None:
    assert choose(gains(rate)) == [count]


def test_at_four_of_five_a_few_drafts_are_worth_it() -> None:
    (count,) = choose(gains(0.8))
    assert 1 <= count <= 8


def test_each_sequence_gets_by_its_own_rate() -> None:
    high, low, none = choose(gains(0.97), gains(0.3), [])
    assert high > 4
    assert low <= 1
    assert none == 0


def test_rows_that_nearly_all_experts_are_read_for_anyhow_cost_little() -> None:
    few, many = choose(gains(0.5)), choose(*[gains(0.5)] * 32)
    assert sum(few) == 0
    assert min(many) >= 1


def test_no_more_than_the_step_has_room_for() -> None:
    assert choose(gains(0.95), gains(0.95), most=5) == [3, 2]
    assert choose(gains(0.95), most=0) == [0]


def test_what_seems_faster_by_a_hair_is_left() -> None:
    seconds = {1: 1.0, 2: 1.9 / (MARGIN - 0.01)}
    assert choose_rows(1, [[0.9]], 1, 1.0, seconds.__getitem__) == [0]
    seconds[2] = 1.9 / (MARGIN + 0.01)
    assert choose_rows(1, [[0.9]], 1, 1.0, seconds.__getitem__) == [1]


def test_a_dear_second_row_does_not_hide_a_cheap_third_one() -> None:
    seconds = {1: 1.0, 2: 2.5, 3: 2.5, 4: 2.5}
    assert choose_rows(1, [[0.99, 0.98, 0.97]], 9, 1.0, seconds.__getitem__) == [3]


@given(
    st.lists(st.lists(st.floats(0.01, 0.99), max_size=4), min_size=1, max_size=3),
    st.lists(st.floats(0.01, 1.5), min_size=16, max_size=16),
    st.integers(0, 12),
)
def test_no_other_numbers_of_drafts_make_more_tokens_a_second(
    rates: list[list[float]], increments: list[float], most: int
) -> None:
    by_sequence = [list(itertools.accumulate(of_one, lambda one, other: one * other)) for of_one in rates]
    seconds = [0.0, *itertools.accumulate(increments)]
    num_sequences = len(rates)

    def rate_of(counts: tuple[int, ...]) -> float:
        tokens = num_sequences + sum(sum(of_one[:count]) for of_one, count in zip(by_sequence, counts, strict=True))
        return tokens / seconds[num_sequences + sum(counts)]

    undrafted_s = seconds[num_sequences] / 1.1
    chosen = tuple(choose_rows(num_sequences, by_sequence, most, undrafted_s, seconds.__getitem__))
    every = itertools.product(*(range(len(of_one) + 1) for of_one in by_sequence))
    best = max(rate_of(counts) for counts in every if sum(counts) <= most)
    undrafted = MARGIN * num_sequences / undrafted_s
    assert sum(chosen) <= most
    if sum(chosen):
        assert rate_of(chosen) == pytest.approx(best)
        assert rate_of(chosen) >= undrafted
    else:
        assert best <= undrafted * (1 + 1e-9)
