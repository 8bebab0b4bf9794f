"""Silence against what the link has shown, by a clock moved by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.node.silence import (
    ALONE_S,
    EARLY,
    LATE_MEMORY_S,
    MEMORY_S,
    PATIENT,
    Patience,
    RecentLongest,
    SilenceWatch,
)

TURN_S = 0.01


class Observed:
    """A loop that turns every 10 ms, and links that echo each ping after a delay, or never."""

    def __init__(self, *links: str) -> None:
        self.watch = SilenceWatch()
        self.now_s = 100.0
        self.delay_s = dict.fromkeys(links, 0.001)
        self.mute: set[str] = set()
        self.held: set[str] = set()
        """Links whose echoes wait, and all come once they go on."""
        self._under_way: list[tuple[float, str, int]] = []

    def run(self, seconds: float, turn_s: float = TURN_S, patience: Patience = EARLY) -> set[str]:
        """Who was silent in any of its turns."""
        silent: set[str] = set()
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += turn_s
            silent |= self.turn(patience)
        return silent

    def turn(self, patience: Patience = EARLY) -> set[str]:
        is_due = self.watch.turn(self.now_s)
        for echo in [echo for echo in self._under_way if echo[0] <= self.now_s and echo[1] not in self.held]:
            self._under_way.remove(echo)
            self.watch.echoed(echo[1], echo[2])
        if is_due:
            self._under_way += [
                (self.now_s + delay_s, link, self.watch.last_ping)
                for link, delay_s in self.delay_s.items()
                if link not in self.mute
            ]
        return set(self.watch.silent(sorted(self.delay_s), patience))

    def seconds_until_silent(self, link: str, patience: Patience = EARLY) -> float:
        self.mute.add(link)
        began_s = self.now_s
        while link not in self.run(TURN_S, patience=patience):
            assert self.now_s - began_s < 9, "never"
        return self.now_s - began_s


def test_a_link_that_always_answered_at_once_is_silent_after_a_quarter_of_a_second() -> None:
    seen = Observed("a", "b")
    assert seen.run(5.0) == set()
    assert 0.25 < seen.seconds_until_silent("a") < 0.35
    assert seen.run(1.0) == {"a"}, "b goes on answering"


def test_without_anybody_ready_in_its_place_it_is_given_longer() -> None:
    seen = Observed("a", "b")
    seen.run(5.0, patience=PATIENT)
    assert 0.7 < seen.seconds_until_silent("a", PATIENT) < 0.8


def test_a_link_that_was_silent_now_and_then_is_given_twice_its_longest_silence() -> None:
    seen = Observed("a", "b", "c")
    seen.run(5.0)
    seen.delay_s["a"] = 0.17
    assert seen.run(1.0) == set()
    seen.delay_s["a"] = 0.001
    seen.run(20.0)
    assert 0.3 < seen.seconds_until_silent("a") < 0.5
    assert 0.25 < seen.seconds_until_silent("b") < 0.35, "each by its own past"


def test_a_link_on_which_packets_are_lost_is_given_as_long_as_they_take_to_come_again() -> None:
    seen = Observed("a", "b")
    seen.run(5.0, patience=PATIENT)
    for pause_s in (0.2, 0.6, 1.4):  # one, two, three times the same packet
        seen.held = {"a"}
        assert seen.run(pause_s, patience=PATIENT) == set()
        seen.held = set()
        assert seen.run(0.5, patience=PATIENT) == set()
    assert seen.watch.explained_s("a", EARLY) is None, "it is not judged early any more"
    assert 2.9 < seen.seconds_until_silent("a", PATIENT) < 3.2


def test_what_a_link_showed_long_ago_is_forgotten() -> None:
    seen = Observed("a", "b")
    seen.run(5.0)
    seen.delay_s["a"] = 0.17
    seen.run(1.0)
    seen.delay_s["a"] = 0.001
    seen.run(MEMORY_S + 15)
    assert seen.watch.explained_s("a", EARLY) == EARLY.shortest_s


def test_a_new_link_is_not_judged_early_before_it_has_answered_a_while() -> None:
    seen = Observed("a", "b")
    seen.run(3.0)
    seen.delay_s["new"] = 0.001
    seen.run(0.8)
    seen.mute.add("new")
    assert seen.run(3.0) == set()
    assert seen.run(1.0, patience=PATIENT) == {"new"}


def test_a_link_that_came_late_is_judged_by_its_own_time_only() -> None:
    seen = Observed("a", "b")
    seen.run(30.0)
    seen.delay_s["new"] = 0.001
    seen.run(3.0)
    assert 0.25 < seen.seconds_until_silent("new") < 0.35


def test_a_new_process_under_an_old_name_begins_anew() -> None:
    seen = Observed("a", "b")
    seen.run(5.0)
    for _ in range(2):
        seen.watch.forget("a")
    assert seen.watch.explained_s("a", EARLY) is None
    assert seen.watch.silence_s("a") == 0.0


@pytest.mark.parametrize("paused_s", [0.3, 2.0, 60.0])
def test_an_observer_that_was_not_there_has_heard_no_silence(paused_s: float) -> None:
    seen = Observed("a", "b")
    seen.run(5.0)
    seen.held = {"a"}
    seen.run(0.05)
    seen.now_s += paused_s  # what came meanwhile waits in its sockets, and is read in any order
    assert seen.turn() == set()
    seen.held = set()
    assert seen.run(2.0) == set()


@pytest.mark.parametrize("cut_s", [0.4, 2.0, 15.0])
def test_an_observer_that_hears_nobody_takes_nobody_for_dead_nor_when_they_come_back_one_by_one(cut_s: float) -> None:
    seen = Observed("a", "b", "c")
    seen.run(5.0)
    seen.held = {"a", "b", "c"}
    assert seen.run(cut_s, patience=PATIENT) == set()
    assert seen.watch.is_alone == (cut_s > ALONE_S)
    for link, later_s in (("a", 0.1), ("b", 0.1 if cut_s < 1 else 1.1), ("c", 0.1)):
        seen.held.discard(link)
        assert seen.run(later_s) == set(), link
    assert seen.run(5.0) == set()
    assert not seen.watch.is_alone
    assert 0.25 < seen.seconds_until_silent("a") < 0.35, "what they did while they came back is not how they are"


def test_an_observer_that_stood_still_waits_for_its_connections_before_it_judges() -> None:
    seen = Observed("a", "b")
    seen.run(5.0)
    seen.now_s += 4.0
    seen.held = {"a"}  # its connection was closed, for the observer was silent; another one takes a while
    assert seen.turn() == set()
    assert seen.watch.is_alone
    assert seen.run(1.2) == set()
    seen.held = set()
    assert seen.run(3.0) == set()
    assert not seen.watch.is_alone
    assert 0.25 < seen.seconds_until_silent("a") < 0.35


def test_an_observer_that_has_never_heard_anybody_has_not_lost_them_all() -> None:
    seen = Observed()
    seen.run(5.0)
    assert not seen.watch.is_alone
    seen.delay_s = {"a": 0.001, "b": 0.001}
    seen.run(0.2)
    assert not seen.watch.is_alone, "they have come, and not come back"


def test_who_does_not_come_back_with_the_others_is_silent() -> None:
    seen = Observed("a", "b", "c")
    seen.run(5.0)
    seen.held = {"a", "b", "c"}
    seen.run(5.0)
    seen.held = {"c"}
    assert seen.run(2.5, patience=PATIENT) == set()
    assert seen.run(2.0, patience=PATIENT) == {"c"}


def test_echoes_of_pings_that_were_never_sent_are_no_echoes() -> None:
    seen = Observed("a", "b")
    seen.run(1.0)
    assert seen.watch.echoed("a", 10**9) is None
    assert seen.watch.echoed("a", 0) is None
    assert seen.watch.echoed("a", 1) is None, "an old one"


@given(
    st.lists(
        st.tuples(st.floats(0.0, 0.09), st.floats(0.0, 0.09), st.floats(0.001, 3.0), st.integers(1, 4)), max_size=60
    )
)
def test_nobody_who_answers_within_a_tenth_of_a_second_is_ever_silent(
    turns: list[tuple[float, float, float, int]],
) -> None:
    """Whatever the observer's loop does."""
    seen = Observed("a", "b")
    seen.run(4.0)
    for a_s, b_s, turn_s, count in turns:
        seen.delay_s = {"a": a_s, "b": b_s}
        for _ in range(count):
            seen.now_s += turn_s
            assert seen.turn() == set()


@given(st.lists(st.tuples(st.floats(0.0, 500.0), st.floats(0.0, 5.0)), min_size=1, max_size=40))
def test_the_longest_is_never_less_than_that_of_the_last_nine_tenths_and_never_more_than_of_all(
    added: list[tuple[float, float]],
) -> None:
    longest, now_s = RecentLongest(300.0), 0.0
    moments: list[tuple[float, float]] = []
    for later_s, seconds in added:
        now_s += later_s
        moments.append((now_s, seconds))
        longest.add(now_s, seconds)
        assert longest.value_s >= max(s for at_s, s in moments if now_s - at_s <= 270.0)
        assert longest.value_s <= max(s for at_s, s in moments if now_s - at_s <= 300.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"shortest_s": 0.0}, "shortest_s"), ({"longest_s": 0.1}, "longest_s"), ({"factor": 0.5}, "factor")],
)
def test_settings_that_make_no_sense_are_refused_by_name(changes: dict[str, float], named: str) -> None:
    good = {"shortest_s": 0.2, "longest_s": 0.6, "factor": 2.0, "min_echoes": 40, "beyond_longest": False}
    with pytest.raises(ConfigurationError, match=named):
        Patience(**{**good, **changes})  # type: ignore[arg-type]


def losing_packets(seen: Observed, links: Sequence[str], seconds: float) -> set[str]:
    """These links hold echoes back for 0.3 to 0.5 s each, one after another, as TCP does with lost packets."""
    silent: set[str] = set()
    for turn in range(int(seconds / 0.2)):
        seen.held = {links[turn % len(links)], links[(turn + 1) % len(links)]}
        silent |= seen.run(0.2, patience=PATIENT)
    seen.held = set()
    return silent


def test_where_half_of_the_links_come_back_late_the_observers_own_link_is_bad_and_nobody_is_judged_early() -> None:
    links = [f"n{number}" for number in range(6)]
    seen = Observed(*links)
    seen.run(10.0)
    assert not seen.watch.is_late
    losing_packets(seen, links[:3], 2.0)
    assert seen.watch.is_late
    assert seen.watch.explained_s("n5", EARLY) is None, "n5 itself has shown nothing"
    assert 5.9 < seen.seconds_until_silent("n5", PATIENT) < 6.2


def test_two_bad_links_of_six_are_those_nodes_own() -> None:
    links = [f"n{number}" for number in range(6)]
    seen = Observed(*links)
    seen.run(10.0)
    losing_packets(seen, links[:2], 4.0)
    assert not seen.watch.is_late
    assert 0.24 < seen.seconds_until_silent("n5", EARLY) < 0.35


def test_a_host_that_is_lost_with_most_nodes_does_not_make_the_observer_late() -> None:
    links = [f"n{number}" for number in range(6)]
    seen = Observed(*links)
    seen.run(10.0)
    seen.mute = set(links[:4])
    assert seen.run(0.4) == seen.mute
    assert not seen.watch.is_late


def test_late_links_are_forgotten_after_a_while_and_count_although_they_are_gone() -> None:
    links = [f"n{number}" for number in range(6)]
    seen = Observed(*links)
    seen.run(10.0)
    losing_packets(seen, links[:3], 2.0)
    for link in links[:3]:
        seen.watch.forget(link)
        del seen.delay_s[link]
    assert seen.watch.is_late
    seen.run(LATE_MEMORY_S + 1.0)
    assert not seen.watch.is_late


def test_who_answers_work_is_not_silent_although_its_echoes_wait_and_is_judged_as_ever_once_it_answers_none() -> None:
    seen = Observed("a", "b")
    seen.run(5.0)
    seen.mute = {"a"}
    for _ in range(20):
        assert seen.run(0.1) == set()
        seen.watch.answered("a", ago_s=0.1)  # a step that took so long
    assert seen.watch.silence_s("a") < 0.15
    assert 0.1 < seen.seconds_until_silent("a") < 0.2, "0.25 s from when that step was sent"


def test_what_was_answered_says_nothing_of_how_late_echoes_are() -> None:
    seen = Observed("a", "b")
    seen.run(5.0)
    seen.held = {"a"}
    for _ in range(4):
        seen.run(0.1)
        seen.watch.answered("a", ago_s=0.05)
    seen.held = set()
    seen.run(1.0)
    explained_s = seen.watch.explained_s("a", PATIENT)
    assert explained_s is not None
    assert explained_s > 1.0, "three times the 0.4 s that its echoes waited"
    seen.watch.answered("nobody", ago_s=0.0)
