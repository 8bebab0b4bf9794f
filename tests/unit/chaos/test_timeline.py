"""A timeline is a function of its seed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.timeline import AllowedFault, TimelineRules, make_timeline, overlapping_groups
from chaos.victims import VictimRule

KILL = AllowedFault(kind="kill", weight=5.0, victims=VictimRule(kind="expert"))
PAUSE = AllowedFault(kind="pause", victims=VictimRule(kind="stage"), heal_after_s=(0.5, 3.0))
AGAIN = AllowedFault(kind="kill", victims=VictimRule(rule="same"))
FLAP = AllowedFault(
    kind="flap", parameters={"times": {"between": [2, 5]}, "off_s": {"between": [0.1, 1.5]}, "on_s": 0.5}
)
ALLOWED = [KILL, PAUSE, AGAIN, FLAP]
RULES = st.builds(
    TimelineRules,
    count=st.integers(1, 60),
    spacing_s=st.tuples(st.floats(0, 1), st.floats(1, 4)),
    overlap=st.floats(0, 1),
)


@given(st.integers(), RULES)
def test_the_same_seed_gives_the_same_faults(seed: int, rules: TimelineRules) -> None:
    assert make_timeline(seed, ALLOWED, rules) == make_timeline(seed, ALLOWED, rules)


def test_another_seed_gives_others() -> None:
    rules = TimelineRules(count=20, spacing_s=(1.0, 2.0))
    assert make_timeline(1, ALLOWED, rules) != make_timeline(2, ALLOWED, rules)


@given(st.integers(), RULES)
def test_faults_keep_their_distance_unless_they_overlap(seed: int, rules: TimelineRules) -> None:
    planned = make_timeline(seed, ALLOWED, rules)
    assert [fault.number for fault in planned] == list(range(rules.count))
    for before, after in itertools.pairwise(planned):
        distance_s = after.at_s - before.at_s
        if after.overlaps:
            assert distance_s == 0
            assert not before.overlaps, "at most two at once"
        else:
            assert rules.spacing_s[0] - 0.002 <= distance_s <= rules.spacing_s[1] + 0.002


@given(st.integers(), st.integers(4, 40))
def test_every_kind_comes_once_where_there_is_room_and_none_before_whom_it_repeats(seed: int, count: int) -> None:
    planned = make_timeline(seed, ALLOWED, TimelineRules(count=count, spacing_s=(0.0, 1.0)))
    assert {(fault.kind, fault.victims.rule) for fault in planned} == {(a.kind, a.victims.rule) for a in ALLOWED}
    assert planned[0].victims.rule != "same"


@given(st.integers())
def test_drawn_parameters_and_times_stay_in_their_ranges(seed: int) -> None:
    for fault in make_timeline(seed, ALLOWED, TimelineRules(count=12, spacing_s=(0.0, 1.0))):
        if fault.kind == "flap":
            assert fault.parameters["times"] in (2, 3, 4, 5)
            assert 0.1 <= fault.parameters["off_s"] <= 1.5
            assert fault.parameters["on_s"] == 0.5
        if fault.kind == "pause":
            assert 0.5 <= fault.heal_after_s <= 3.0


def test_weights_count() -> None:
    planned = make_timeline(3, [KILL, PAUSE], TimelineRules(count=600, spacing_s=(0.0, 1.0)))
    share = sum(fault.kind == "kill" for fault in planned) / 600
    assert share == pytest.approx(5 / 6, abs=0.06)


def test_no_overlap_without_asking_for_it_and_groups_hold_those_that_do() -> None:
    assert not any(f.overlaps for f in make_timeline(1, ALLOWED, TimelineRules(count=50, spacing_s=(0.0, 1.0))))
    planned = make_timeline(1, ALLOWED, TimelineRules(count=50, spacing_s=(0.0, 1.0), overlap=1.0))
    groups = overlapping_groups(planned)
    assert [len(group) for group in groups] == [2] * 25
    assert [fault for group in groups for fault in group] == planned


@pytest.mark.parametrize("value", [{"between": [1]}, {"one_of": []}, {"between": ["a", "b"]}])
def test_a_choice_that_is_none_is_refused(value: object) -> None:
    wrong = AllowedFault(kind="flap", parameters={"times": value})
    with pytest.raises(ValueError, match="takes two numbers"):
        make_timeline(0, [wrong], TimelineRules(count=1, spacing_s=(0.0, 1.0)))


def test_nothing_allowed_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        make_timeline(0, [], TimelineRules(count=1, spacing_s=(0.0, 1.0)))
