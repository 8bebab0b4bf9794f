"""Which evicted block lies in which tier slot, and which one goes when others need room."""

from __future__ import annotations

from common.ids import StepId
from services.router.scheduling.blocks.session_tier import SessionTier, TierCounters


def make(num_slots: int) -> SessionTier:
    return SessionTier(num_slots, TierCounters())


def save(tier: SessionTier, step: int, *keys: bytes) -> tuple[tuple[int, int], ...]:
    """A step is given the blocks of these keys, and is answered; a key is named by its block."""
    for key in keys:
        tier.keep(key, key[0])
    saves = tier.begin_step(StepId(step), {key[0] for key in keys}, ())
    tier.end_step(StepId(step), is_done=True)
    tier.check_invariants()
    return saves


def test_a_block_is_saved_by_the_step_that_gets_it_and_found_once_that_is_answered() -> None:
    tier = make(4)
    tier.keep(b"\x09", 9)
    tier.keep(b"\x03", 3)
    assert tier.begin_step(StepId(1), {3, 9, 5}, ()) == ((9, 0), (3, 1)), "the lowest slots first"
    assert tier.find(b"\x09") is None
    tier.end_step(StepId(1), is_done=True)
    assert (tier.find(b"\x09"), tier.find(b"\x03"), tier.num_kept) == (0, 1, 2)
    tier.check_invariants()


def test_what_a_void_step_was_to_save_is_dropped_and_so_is_what_no_step_was_given() -> None:
    tier = make(1)
    tier.keep(b"\x01", 1)
    assert tier.begin_step(StepId(1), {1}, ()) == ((1, 0),)
    tier.end_step(StepId(1), is_done=False)
    assert (tier.find(b"\x01"), tier.num_kept) == (None, 0)
    tier.keep(b"\x02", 2)
    assert tier.begin_step(StepId(2), {7}, ()) == ()
    assert tier.num_kept == 0
    tier.check_invariants()


def test_what_was_kept_longest_goes_first_unless_it_is_needed() -> None:
    tier = make(3)
    save(tier, 1, b"\x01", b"\x02", b"\x03")
    tier.touch([b"\x01"])
    save(tier, 2, b"\x04")
    assert [tier.find(bytes([key])) is not None for key in (1, 2, 3, 4)] == [True, False, True, True]
    tier.note_back([b"\x04"])  # it is in a block again
    save(tier, 3, b"\x05")
    assert [tier.find(bytes([key])) is not None for key in (1, 3, 4, 5)] == [True, True, False, True]


def test_a_block_that_lies_there_already_is_not_saved_again_and_is_the_last_to_go() -> None:
    tier = make(2)
    save(tier, 1, b"\x01", b"\x02")
    assert save(tier, 2, b"\x01") == ()
    save(tier, 3, b"\x03")
    assert (tier.find(b"\x01"), tier.find(b"\x02")) == (0, None)


def test_slots_that_steps_in_flight_read_or_write_or_the_next_will_read_are_given_to_nobody() -> None:
    tier = make(3)
    save(tier, 1, b"\x01", b"\x02")
    tier.begin_step(StepId(2), (), [0])  # reads the first
    tier.hold([1])  # the next one will read the second
    tier.keep(b"\x03", 3)
    tier.keep(b"\x04", 4)
    assert tier.begin_step(StepId(3), {3, 4}, [1]) == ((3, 2),), "the fourth finds no room"
    tier.keep(b"\x05", 5)
    assert tier.begin_step(StepId(4), {5}, ()) == ()
    tier.check_invariants()
    tier.end_step(StepId(2), is_done=True)
    tier.keep(b"\x05", 5)
    assert tier.begin_step(StepId(5), {5}, ()) == ((5, 0),)
    tier.check_invariants()


def test_another_generation_keeps_what_all_holders_have() -> None:
    tier = make(4)
    for step, key in ((3, b"\x03"), (5, b"\x05"), (7, b"\x07")):
        save(tier, step, key)
    tier.retain(3, 6)
    assert [tier.find(key) is not None for key in (b"\x03", b"\x05", b"\x07")] == [False, True, False]
    tier.retain(0, None)
    assert tier.num_kept == 1
    tier.check_invariants()


def test_counters_say_what_was_saved_and_dropped() -> None:
    counters = TierCounters()
    tier = SessionTier(1, counters)
    save(tier, 1, b"\x01")
    save(tier, 2, b"\x02")
    assert (counters.blocks_saved, counters.blocks_dropped) == (2, 1)


def test_without_slots_nothing_is_kept() -> None:
    assert save(make(0), 1, b"\x01") == ()
