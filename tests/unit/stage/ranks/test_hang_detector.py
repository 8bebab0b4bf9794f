"""When a rank's process is taken to be lost."""

from __future__ import annotations

from services.stage.ranks.supervisor import ASLEEP_S, HOPELESS_S, STOPPED_S, HangDetector, ProcessSample, parse_stat

INTERVAL_S = 0.05


def first_trouble(state: str, seconds: float, *, waits: bool, cpu_per_s: float = 0.0) -> tuple[str, float]:
    """What was said first of a process that is in one state for so long, and when."""
    detector, now_s = HangDetector(), 0.0
    while now_s < seconds:
        trouble = detector.trouble(ProcessSample(state, now_s * cpu_per_s), now_s if waits else 0.0, now_s)
        if trouble:
            return trouble, now_s
        now_s += INTERVAL_S
    return "", now_s


def test_a_stopped_process_is_lost_soon_whether_it_is_waited_for_or_not() -> None:
    for state in "Tt":
        for waits in (False, True):
            trouble, after_s = first_trouble(state, 5, waits=waits)
            assert trouble == "it is stopped"
            assert STOPPED_S <= after_s < STOPPED_S + 2 * INTERVAL_S


def test_one_that_goes_on_in_time_is_not() -> None:
    detector = HangDetector()
    for number in range(100):
        state = "T" if number % 8 < 6 else "S"
        assert not detector.trouble(ProcessSample(state, 0.0), 0.0, number * INTERVAL_S)


def test_one_that_sleeps_while_it_is_waited_for_hangs() -> None:
    trouble, after_s = first_trouble("S", 5, waits=True)
    assert trouble == "it sleeps while rank 0 waits for it"
    assert after_s < ASLEEP_S + 3 * INTERVAL_S


def test_an_idle_one_may_sleep_for_ever() -> None:
    assert first_trouble("S", 100, waits=False)[0] == ""


def test_one_that_computes_or_wants_a_processor_is_left_alone_for_long() -> None:
    assert first_trouble("R", HOPELESS_S - 1, waits=True)[0] == ""
    assert first_trouble("S", HOPELESS_S - 1, waits=True, cpu_per_s=0.5)[0] == ""
    assert "has not come" in first_trouble("R", HOPELESS_S + 1, waits=True)[0]


def test_the_name_of_a_process_may_hold_anything() -> None:
    text = "12 (a) R (b) T 1 2 3 4 5 6 7 8 9 10 150 50 0 0"
    assert parse_stat(text, 100) == ProcessSample("T", 2.0)
