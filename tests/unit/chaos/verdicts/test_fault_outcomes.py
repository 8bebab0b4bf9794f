"""What is put down to which fault, and when a fault is known to have hit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chaos.record.history import (
    ChoiceFinished,
    Ended,
    Event,
    FaultApplied,
    FaultHealed,
    FaultSkipped,
    HarnessLate,
    MeshWhole,
    Tokens,
)
from chaos.record.operations import ChoiceRecord, Operation
from chaos.verdicts.fault_outcomes import tpot_p99_s
from chaos.verdicts.judgement import Bounds, judge
from chaos.verdicts.verdict import State, Verdict
from tests.support.chaos.histories import (
    FAULT_S,
    FAULTS_BEGIN_S,
    NODES,
    STEP_S,
    alter,
    answer,
    good_history,
    later,
)
from tests.support.chaos.judgements import broken, states


def test_a_stall_below_its_bound_is_held_and_the_bound_is_of_kind_and_victim() -> None:
    events = later(good_history(), "run-0", FAULT_S, 2.0)
    assert broken(events) == set()
    assert broken(events, Bounds(stall_s={"default": 10.0, "kill/expert": 0.4})) == {"stalls"}
    assert broken(events, Bounds(stall_s={"default": 10.0, "kill/stage": 0.4})) == set()
    (outcome,) = judge(events, Bounds()).outcomes
    assert outcome.gap_max_s == pytest.approx(2.0, abs=0.01)
    assert outcome.gap_p50_s == pytest.approx(0.0, abs=0.01)
    assert outcome.tokens_again_s == pytest.approx(2.0 + STEP_S / 2, abs=0.01)


@pytest.mark.parametrize(("at_s", "is_told"), [(FAULT_S + 1.9, True), (FAULT_S - 0.1, False)])
def test_a_stall_beside_which_the_harness_stood_still_is_broken_and_says_so(at_s: float, is_told: bool) -> None:
    events = [*later(good_history(), "run-0", FAULT_S, 2.0), HarnessLate(at_s, 1.8)]
    bounds = Bounds(stall_s={"default": 1.0})
    assert broken(events, bounds) == {"stalls"}
    (verdict,) = (verdict for verdict in judge(events, bounds).verdicts if verdict.name == "stalls")
    assert ("the harness itself stood still for 1.80 s meanwhile" in verdict.sentence) == is_told


def test_a_gap_before_the_fault_is_not_put_down_to_it() -> None:
    (outcome,) = judge(later(good_history(), "run-0", FAULTS_BEGIN_S + 0.15, 0.35), Bounds()).outcomes
    assert outcome.gap_max_s == pytest.approx(0.0, abs=0.01)


def test_a_stream_that_gets_nothing_until_the_record_ends_has_stalled_so_long() -> None:
    gone = [
        event
        for event in good_history()
        if not (
            isinstance(event, Tokens | ChoiceFinished | Ended) and event.operation == "run-0" and event.at_s > FAULT_S
        )
    ]
    (outcome,) = judge(gone, Bounds()).outcomes
    assert outcome.gap_max_s > 4.0


def test_a_fault_without_streams_in_flight_is_not_known_to_have_been_survived() -> None:
    events = alter(good_history(), FaultApplied, lambda e: replace(e, at_s=FAULTS_BEGIN_S + 2.5))
    judgement = judge(events, Bounds())
    assert states(judgement)["faults_hit"] is State.UNKNOWN
    assert states(judgement)["stalls"] is State.UNKNOWN
    assert judgement.state is State.UNKNOWN


def test_a_fault_whose_victims_were_dead_already_is_unknown() -> None:
    events = alter(good_history(), FaultApplied, lambda e: replace(e, alive=()))
    assert states(judge(events, Bounds()))["faults_hit"] is State.UNKNOWN


@pytest.mark.parametrize(
    ("roles", "has_hit"), [(("spare",), False), (("mirror of 0/1",), True), (("holder of 0/1",), True), ((), True)]
)
def test_a_fault_that_only_hurt_spares_is_not_known_to_have_hit_work(roles: tuple[str, ...], has_hit: bool) -> None:
    events = alter(good_history(), FaultApplied, lambda e: replace(e, roles=roles))
    assert judge(events, Bounds()).outcomes[0].has_hit is has_hit


def test_what_showed_only_when_a_fault_was_healed_is_told_and_a_doubt_of_then_is_one() -> None:
    told = alter(good_history(), FaultHealed, lambda e: replace(e, remark="expert-0 was killed in a call"))
    judgement = judge(told, Bounds())
    assert judgement.outcomes[0].remark == "expert-0 was killed in a call"
    assert states(judgement)["faults_hit"] is State.HELD
    doubted = judge(alter(good_history(), FaultHealed, lambda e: replace(e, doubt="no bell was rung")), Bounds())
    assert doubted.outcomes[0].doubts == ("no bell was rung",)
    assert states(doubted)["faults_hit"] is State.UNKNOWN


def test_the_time_a_token_takes_beside_a_fault_is_compared_with_the_usual_one_where_asked() -> None:
    def verdict(events: list[Event], ratio: dict[str, float]) -> Verdict | None:
        found = [v for v in judge(events, Bounds(tpot_ratio=ratio)).verdicts if v.name == "tpot"]
        return found[0] if found else None

    calm = verdict(good_history(), {"kill": 1.01})
    assert calm is not None
    assert calm.state is State.HELD
    assert calm.figures["tpot_ratio_max"] == pytest.approx(1.0)
    # One of four answers, 1.1 s long undisturbed, waits 1.1 s: twice the time a token.
    slow = later(good_history(), "run-0", FAULT_S, 1.1)
    broken = verdict(slow, {"kill": 1.5})
    assert broken is not None
    assert broken.state is State.BROKEN
    assert broken.figures["tpot_ratio_max"] == pytest.approx(2.0, abs=0.05)
    assert verdict(slow, {}) is None
    other = verdict(slow, {"pause": 1.5})
    assert other is not None
    assert other.state is State.UNKNOWN


def test_a_stall_of_an_answer_that_began_while_a_long_fault_went_on_is_put_down_to_it() -> None:
    late_s = FAULT_S + 1.5
    history = [
        *alter(good_history(), MeshWhole, lambda e: replace(e, at_s=late_s + 5)),
        *later(answer("late", 0, late_s), "late", late_s + 0.5, 2.0),
    ]
    history.sort(key=lambda event: event.at_s)  # asked in the phase of faults
    assert judge(history, Bounds()).outcomes[0].gap_max_s == pytest.approx(2.0, abs=0.01)


def test_the_bound_of_one_node_is_not_that_of_several_at_once_or_of_faults_that_overlap() -> None:
    bounds = Bounds(stall_s={"default": 10.0, "kill/expert": 0.4, "kill/stage": 0.4})
    slow = later(good_history(), "run-0", FAULT_S, 3.0)

    def stalls(events: list[Event]) -> State:
        return next(v.state for v in judge(events, bounds).verdicts if v.name == "stalls")

    assert stalls(slow) is State.BROKEN
    both = alter(slow, FaultApplied, lambda e: replace(e, victims=NODES[1:], alive=("stage-0", "expert-0")))
    assert stalls(both) is State.HELD
    second: list[Event] = [
        FaultApplied(FAULT_S + 0.05, 1, "kill", (NODES[1],), ("stage-0",), {}),
        FaultHealed(FAULT_S + 0.1, 1),
        MeshWhole(FAULT_S + 0.5, 1),
    ]
    assert stalls([*slow, *second]) is State.HELD
    after = [replace(event, at_s=event.at_s + 1.0) for event in second]
    assert stalls([*slow, *after]) is State.BROKEN


def test_a_run_without_a_fault_is_unknown() -> None:
    events = [e for e in good_history() if not isinstance(e, FaultApplied)]
    assert states(judge(events, Bounds()))["faults_hit"] is State.UNKNOWN


@pytest.mark.parametrize(("is_expected", "state"), [(True, State.HELD), (False, State.UNKNOWN)])
def test_a_fault_that_the_target_does_not_offer_is_left_out_and_one_that_found_nobody_is_a_doubt(
    is_expected: bool, state: State
) -> None:
    events = [*good_history(), FaultSkipped(20.0, 1, "kill", "why", is_expected)]
    assert states(judge(events, Bounds()))["faults_hit"] is state


def test_a_stall_of_the_next_fault_is_not_put_down_to_the_one_before() -> None:
    next_s = FAULT_S + 0.4
    events = later(good_history(), "run-0", next_s, 3.0)
    events += [
        FaultApplied(next_s, 1, "kill", (NODES[1],), ("stage-0",), {}),
        FaultHealed(next_s + 0.01, 1),
        MeshWhole(next_s + 4, 1),
    ]
    first, second = judge(events, Bounds()).outcomes
    assert first.gap_max_s == pytest.approx(0.0, abs=0.01)
    assert first.tokens_again_s == 0.0
    assert second.gap_max_s == pytest.approx(3.0, abs=0.01)
    assert second.tokens_again_s == pytest.approx(3.0 + STEP_S / 2, abs=0.01)
    assert second.victim_kinds == ("stage",)


def test_a_short_answer_has_no_time_a_token() -> None:
    def operation(num_tokens: int, seconds: float) -> Operation:
        record = Operation("a", "faults", "request-0", 0.0, [ChoiceRecord()], max_tokens=100)
        record.arrivals_s, record.num_tokens = [0.0, seconds], num_tokens
        return record

    assert tpot_p99_s([operation(5, 4.0)]) == 0.0, "one gap decides it"
    assert tpot_p99_s([operation(5, 4.0), operation(51, 1.0)]) == pytest.approx(0.02)
