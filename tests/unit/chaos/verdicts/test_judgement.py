"""Each kind of damage turns its verdict red; a run that was not hurt proves nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

from chaos.record.history import (
    Abandoned,
    ChoiceFinished,
    Ended,
    Event,
    FaultApplied,
    MeshWhole,
    MetricsSeen,
    NodesSeen,
    PhaseBegan,
    ProcessSeen,
    RequestFailed,
    RequestRefused,
    Tokens,
)
from chaos.record.operations import ChoiceRecord, read_operations
from chaos.record.reference import reference_of
from chaos.target import Node
from chaos.verdicts.fault_outcomes import Throughput
from chaos.verdicts.judgement import TIMED, Bounds, RunJudgement, bound_for, judge
from chaos.verdicts.verdict import State, Verdict, percentile, worst
from tests.support.chaos.histories import (
    FAULT_S,
    FAULTS_BEGIN_S,
    NODES,
    QUIET,
    STEP_S,
    alter,
    alter_tokens,
    good_history,
    later,
)
from tests.support.chaos.judgements import broken, states

Damage = Callable[[list[Event]], list[Event]]


def test_a_run_in_which_nothing_went_wrong_is_held_in_every_verdict_and_its_hashes_agree() -> None:
    judgement = judge(good_history(), Bounds())
    assert set(states(judgement).values()) == {State.HELD}, judgement.verdicts
    assert judgement.state is State.HELD
    assert judgement.sha256_with_faults == judgement.sha256_without_faults


def flipped(bits: str) -> str:
    """The lowest bit of the mantissa."""
    return f"{int(bits, 16) ^ 1:016x}"


def test_a_flipped_mantissa_bit_is_another_number_that_prints_almost_alike() -> None:
    one, other = (struct.unpack(">d", bytes.fromhex(bits))[0] for bits in ("bff0000000000000", "bff0000000000001"))
    assert flipped("bff0000000000000") == "bff0000000000001"
    assert one != other
    assert one == pytest.approx(other, rel=1e-15)


def dropped(events: list[Event]) -> list[Event]:
    return alter_tokens(events, "run-0", 5, lambda event: None)


def dropped_at_the_end(events: list[Event]) -> list[Event]:
    return alter_tokens(events, "run-0", 11, lambda event: None)


def doubled(events: list[Event]) -> list[Event]:
    return alter_tokens(
        events, "run-2", 5, lambda e: replace(e, token_ids=e.token_ids * 2, logprob_bits=e.logprob_bits * 2)
    )


def changed(events: list[Event]) -> list[Event]:
    return alter_tokens(events, "run-1", 5, lambda e: replace(e, token_ids=(e.token_ids[0] + 1,)))


def one_bit_of_a_logprob(events: list[Event]) -> list[Event]:
    return alter_tokens(events, "run-3", 5, lambda e: replace(e, logprob_bits=(flipped(e.logprob_bits[0]),)))


def without_a_logprob(events: list[Event]) -> list[Event]:
    return alter_tokens(events, "run-3", 11, lambda e: replace(e, logprob_bits=()))


def another_reason(events: list[Event]) -> list[Event]:
    return alter(events, ChoiceFinished, lambda e: replace(e, reason="stop") if e.operation == "run-0" else e)


def another_text(events: list[Event]) -> list[Event]:
    return alter(events, ChoiceFinished, lambda e: replace(e, text_sha256="") if e.operation == "run-0" else e)


def failed(events: list[Event]) -> list[Event]:
    return alter(
        events,
        Ended,
        lambda e: RequestFailed(e.at_s, e.operation, "node_lost", "gone") if e.operation == "run-0" else e,
    )


def abandoned(events: list[Event]) -> list[Event]:
    return alter(events, Ended, lambda e: Abandoned(e.at_s, e.operation, 300.0) if e.operation == "run-0" else e)


def without_an_end(events: list[Event]) -> list[Event]:
    return alter(events, Ended, lambda e: None if e.operation == "run-0" else e)


def refused(events: list[Event]) -> list[Event]:
    return [*events, RequestRefused(FAULT_S, "run-0", 503, "not ready")]


def stalled(events: list[Event]) -> list[Event]:
    return later(events, "run-0", FAULT_S, 12.0)


def never_whole(events: list[Event]) -> list[Event]:
    return alter(events, MeshWhole, lambda e: None)


def whole_too_late(events: list[Event]) -> list[Event]:
    return alter(events, MeshWhole, lambda e: replace(e, at_s=e.at_s + 61))


def a_block_is_not_free(events: list[Event]) -> list[Event]:
    return alter(events, MetricsSeen, lambda e: replace(e, values=QUIET | {"moemesh_kv_blocks_free": 63.0}))


def a_request_runs(events: list[Event]) -> list[Event]:
    return alter(events, MetricsSeen, lambda e: replace(e, values=QUIET | {"moemesh_requests_running": 1.0}))


def at_the_end(**more: int) -> Damage:
    def change(event: ProcessSeen) -> ProcessSeen:
        is_it = event.name == "stage-0" and event.at_s > FAULTS_BEGIN_S
        return replace(event, **{n: getattr(event, n) + v for n, v in more.items()}) if is_it else event

    return lambda events: alter(events, ProcessSeen, change)


PLANTED: dict[str, tuple[Damage, set[str]]] = {
    "token dropped": (dropped, {"tokens_lost"}),
    "last token dropped": (dropped_at_the_end, {"tokens_lost"}),
    "token doubled": (doubled, {"tokens_doubled"}),
    "token changed": (changed, {"tokens_changed"}),
    "one mantissa bit of a log-probability": (one_bit_of_a_logprob, {"logprobs"}),
    "log-probability missing": (without_a_logprob, {"logprobs"}),
    "finish reason": (another_reason, {"ends"}),
    "text": (another_text, {"ends"}),
    "typed error": (failed, {"errors"}),
    "given up by the client": (abandoned, {"hung"}),
    "no end in the record": (without_an_end, {"hung"}),
    "refused": (refused, {"refused"}),
    "stall": (stalled, {"stalls"}),
    "mesh never whole": (never_whole, {"recovery"}),
    "mesh whole too late": (whole_too_late, {"recovery"}),
    "block leaked": (a_block_is_not_free, {"leaks_mesh"}),
    "request leaked": (a_request_runs, {"leaks_mesh"}),
    "memory leaked": (at_the_end(rss_bytes=200 * 2**20), {"leaks_processes"}),
    "sockets leaked": (at_the_end(num_sockets=17), {"leaks_processes"}),
    "files leaked": (at_the_end(num_files=17), {"leaks_processes"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_damage_turns_its_verdict_red_and_no_other(name: str) -> None:
    plant, verdicts = PLANTED[name]
    assert broken(plant(good_history())) == verdicts


@pytest.mark.parametrize("plant", [dropped, doubled, changed, dropped_at_the_end])
def test_the_hashes_differ_when_tokens_do(plant: Damage) -> None:
    judgement = judge(plant(good_history()), Bounds())
    assert judgement.sha256_with_faults != judgement.sha256_without_faults


def test_the_same_damage_without_faults_is_not_blamed_on_faults() -> None:
    events = alter(
        good_history(),
        Ended,
        lambda e: RequestFailed(e.at_s, e.operation, "x", "y") if e.operation == "reference-0" else e,
    )
    judgement = judge(events, Bounds())
    assert states(judgement)["errors"] is State.HELD
    assert states(judgement)["tokens_lost"] is State.UNKNOWN, "there is nothing to compare run-0 with"


def test_an_answer_that_broke_off_is_an_error_and_its_beginning_is_not_called_lost() -> None:
    events = failed(good_history())
    events = [e for e in events if not (isinstance(e, Tokens) and e.operation == "run-0" and e.offset > 6)]
    assert broken(events) == {"errors"}


def test_an_answer_that_broke_off_is_wrong_where_its_beginning_is() -> None:
    events = failed(dropped(good_history()))
    assert "errors" in broken(events)
    assert broken(events) & {"tokens_lost", "tokens_changed"}


def test_without_answers_nothing_is_known() -> None:
    events = [e for e in good_history() if not (hasattr(e, "operation") and e.operation.startswith("run-"))]
    found = states(judge(events, Bounds()))
    assert {found[n] for n in ("tokens_lost", "logprobs", "errors", "hung", "first_tokens")} == {State.UNKNOWN}


@pytest.mark.parametrize("missing", [MetricsSeen, ProcessSeen])
def test_leaks_are_unknown_where_nobody_looked(missing: type[Event]) -> None:
    events = [e for e in good_history() if not isinstance(e, missing)]
    name = "leaks_mesh" if missing is MetricsSeen else "leaks_processes"
    assert states(judge(events, Bounds()))[name] is State.UNKNOWN
    assert "leaks_processes" not in states(judge(events, Bounds(), sees_processes=False))


def test_a_mesh_whose_metrics_are_not_these_is_not_known_to_have_no_leak() -> None:
    events = alter(good_history(), MetricsSeen, lambda e: replace(e, values={"moemesh_ready": 1.0}))
    assert states(judge(events, Bounds()))["leaks_mesh"] is State.UNKNOWN


def test_a_process_that_is_replaced_while_the_machine_is_only_busy_is_a_false_death() -> None:
    events = alter(good_history(), FaultApplied, lambda e: replace(e, kind="cpu_hog", victims=(), alive=()))
    assert states(judge(events, Bounds()))["false_deaths"] is State.HELD
    replaced = (*NODES[:2], Node("expert-0", "expert", 555))
    events = [*events, NodesSeen(FAULT_S + 0.05, replaced)]
    assert broken(events) == {"false_deaths"}


def test_throughput_inside_fault_windows_is_compared_when_asked_for() -> None:
    events = alter(
        good_history(), PhaseBegan, lambda e: replace(e, at_s=FAULTS_BEGIN_S + 1.2) if e.phase == "finish" else e
    )
    judgement = judge(events, Bounds())
    assert judgement.throughput.inside_s == pytest.approx(0.5)
    assert judgement.throughput.inside == pytest.approx(6 * 5 / 0.5)
    assert broken(events, Bounds(throughput_share=0.8)) == set()
    slow = [e for e in events if not (isinstance(e, Tokens) and FAULT_S < e.at_s < FAULT_S + 0.35)]
    assert "throughput" in broken(slow, Bounds(throughput_share=0.8))


def test_a_stored_reference_is_the_oracle_where_there_is_one() -> None:
    events = good_history()
    other = {
        name: [ChoiceRecord([1], [""], "length", "") for _ in range(1 + n % 2)]
        for n, name in enumerate(sorted(reference_of(read_operations(events))))
    }
    assert states(judge(events, Bounds(), other))["tokens_changed"] is State.BROKEN


def test_first_tokens_that_come_late_are_a_verdict_of_their_own() -> None:
    assert broken(good_history(), Bounds(first_token_s=0.05)) == {"first_tokens"}


def test_bounds_go_from_the_exact_to_the_general() -> None:
    bounds = {"default": 9.0, "kill": 5.0, "kill/expert": 0.4}
    assert bound_for(bounds, "kill", ["expert"]) == 0.4
    assert bound_for(bounds, "kill", ["stage"]) == 5.0
    assert bound_for(bounds, "pause", ["stage"]) == 9.0
    assert bound_for(bounds, "kill", ["expert", "stage"]) == 5.0, "two victims: the bound of the slower one"
    assert bound_for(bounds, "cpu_hog", []) == 9.0


def test_the_worst_state_counts() -> None:
    assert worst([State.HELD, State.UNKNOWN]) is State.UNKNOWN
    assert worst([State.HELD, State.UNKNOWN, State.BROKEN]) is State.BROKEN
    assert worst([State.HELD]) is State.HELD
    assert worst([]) is State.UNKNOWN


def test_times_can_be_left_out_of_the_outcome_and_nothing_else_can() -> None:
    verdicts = [Verdict(name, State.HELD, "") for name in sorted(TIMED)] + [Verdict("tokens_lost", State.HELD, "")]

    def judged(**broken: State) -> RunJudgement:
        changed = tuple(replace(verdict, state=broken.get(verdict.name, verdict.state)) for verdict in verdicts)
        return RunJudgement(changed, (), (), Throughput(0, 0, 0, 0), 0.0, 0.0, "", "")

    late = judged(stalls=State.BROKEN)
    assert (late.state, late.untimed_state) == (State.BROKEN, State.HELD)
    lost = judged(tokens_lost=State.BROKEN)
    assert (lost.state, lost.untimed_state) == (State.BROKEN, State.BROKEN)


def test_percentiles_are_by_nearest_rank() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile(values[:16], 0.99) == 16.0
    assert percentile([], 0.5) == 0.0


def test_the_time_of_load_ends_when_clients_are_told_to_finish() -> None:
    events = alter(good_history(), PhaseBegan, lambda e: replace(e, at_s=FAULT_S + 1) if e.phase == "finish" else e)
    speed = judge(events, Bounds()).throughput
    assert speed.inside_s + speed.outside_s == pytest.approx(FAULT_S + 1 - FAULTS_BEGIN_S - STEP_S)
