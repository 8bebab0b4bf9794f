"""When a late call is asked of a further copy: the delay follows the replies, the budget bounds the load."""

from __future__ import annotations

import pytest

from services.stage.experts.hedging import (
    CEILING_S,
    DELAY_FACTOR,
    FLOOR_S,
    HEDGE_BURST,
    HEDGES_PER_CALL,
    LONGEST_SILENCE_S,
    MIN_SAMPLES,
    SHORTEST_SILENCE_S,
    WINDOW,
    HedgeBudget,
    ReplyTimes,
)


def times_of(*seconds: float, layer: int = 0) -> ReplyTimes:
    times = ReplyTimes()
    for value in seconds:
        times.add(layer, value)
    return times


def test_before_there_are_replies_a_call_is_given_the_longest_time() -> None:
    times = times_of(*[0.001] * (MIN_SAMPLES - 1))
    assert times.delay_s(0) == CEILING_S
    assert times.silence_s(0) == LONGEST_SILENCE_S


def test_the_delay_is_a_little_over_what_nearly_all_replies_took() -> None:
    times = times_of(*[0.02] * WINDOW)
    assert times.delay_s(0) == pytest.approx(DELAY_FACTOR * 0.02)


def test_one_slow_reply_in_a_hundred_does_not_raise_the_delay_to_itself() -> None:
    times = times_of(*[0.02, *[0.02] * 126, 0.09] * 2)
    assert times.delay_s(0) < DELAY_FACTOR * 0.09


@pytest.mark.parametrize(("reply_s", "delay_s"), [(0.0001, FLOOR_S), (3.0, CEILING_S)])
def test_the_delay_stays_in_its_bounds(reply_s: float, delay_s: float) -> None:
    assert times_of(*[reply_s] * WINDOW).delay_s(0) == delay_s


def test_a_layer_with_few_replies_goes_by_those_of_all() -> None:
    times = times_of(*[0.03] * WINDOW)
    times.add(7, 0.0)
    assert times.delay_s(7) == pytest.approx(times.delay_s(0), rel=0.05)


def test_a_layer_with_replies_of_its_own_goes_by_them() -> None:
    times = times_of(*[0.03] * WINDOW)
    for _ in range(MIN_SAMPLES):
        times.add(7, 0.02)
    assert times.delay_s(7) == pytest.approx(DELAY_FACTOR * 0.02)


def test_old_replies_are_forgotten() -> None:
    times = times_of(*[0.06] * WINDOW, *[0.02] * WINDOW)
    assert times.delay_s(0) == pytest.approx(DELAY_FACTOR * 0.02)


def test_a_node_is_not_taken_to_hang_for_what_replies_usually_take() -> None:
    assert times_of(*[0.01] * WINDOW).silence_s(0) == SHORTEST_SILENCE_S
    assert times_of(*[0.3] * WINDOW).silence_s(0) > 0.3
    assert times_of(*[9.0] * WINDOW).silence_s(0) == LONGEST_SILENCE_S


def test_a_general_slowdown_cannot_add_more_than_a_small_share_of_calls() -> None:
    budget, num_calls = HedgeBudget(), 1000
    hedges = 0
    for _ in range(num_calls):
        budget.earn()
        hedges += budget.spend()
    assert hedges <= HEDGE_BURST + HEDGES_PER_CALL * num_calls
    assert hedges >= HEDGES_PER_CALL * num_calls


def test_quiet_times_save_up_no_more_than_a_burst() -> None:
    budget = HedgeBudget()
    for _ in range(10_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == HEDGE_BURST
