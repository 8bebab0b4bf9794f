"""From a history to its verdicts. Pure: the same history and bounds give the same judgement, long after the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from chaos.record.history import Event, FaultSkipped, NodesSeen, PhaseBegan
from chaos.record.operations import Operation, read_operations
from chaos.record.reference import Reference, reference_of
from chaos.suite_fields import Count, Positive, Section, Share
from chaos.verdicts.fault_outcomes import (
    FaultOutcome,
    Throughput,
    fault_outcomes,
    throughput,
    tpot_p99_s,
    usual_gap_s,
)
from chaos.verdicts.leaks import LeakBounds, leak_verdicts
from chaos.verdicts.token_verdicts import (
    digest_with_faults,
    digest_without_faults,
    end_verdicts,
    salt_verdict,
    token_verdicts,
)
from chaos.verdicts.verdict import State, Verdict, percentile, verdict_of, worst

DEFAULT = "default"


class Bounds(Section):
    """What is still good. Keys of the maps: `kill/stage` before `kill` before `default`; seconds.

    Stalls are held against `kill/stage` where one node was hurt at a time, else against `kill` or `default`.
    """

    stall_s: Mapping[str, Positive] = Field(default_factory=lambda: {DEFAULT: 10.0})
    """It bounds the 99th percentile over streams of the longest extra gap between tokens."""
    recovery_s: Mapping[str, Positive] = Field(default_factory=lambda: {DEFAULT: 60.0})
    """It bounds the time from healing until the mesh is whole."""
    first_token_s: Positive = 60.0
    max_refused: Count | None = 0
    tpot_ratio: Mapping[str, Positive] = Field(default_factory=dict)
    """It bounds the p99 of seconds a token of the answers beside a fault over that of the undisturbed ones, for the
    kinds that are named."""
    throughput_share: Share | None = None
    """Tokens a second inside fault windows must be at least this share of those outside; None does not ask."""
    harmless: tuple[str, ...] = ("cpu_hog",)
    """No process may be replaced during faults of these kinds."""
    leaks: LeakBounds = LeakBounds()


TIMED = frozenset({"stalls", "tpot", "first_tokens", "recovery", "throughput"})
"""These verdicts measure time."""


@dataclass(frozen=True, slots=True)
class RunJudgement:
    """All verdicts of a run and the figures behind them."""

    verdicts: tuple[Verdict, ...]
    outcomes: tuple[FaultOutcome, ...]
    skipped: tuple[FaultSkipped, ...]
    throughput: Throughput
    usual_gap_s: float
    usual_tpot_s: float
    sha256_with_faults: str
    sha256_without_faults: str

    @property
    def state(self) -> State:
        return worst(verdict.state for verdict in self.verdicts)

    @property
    def untimed_state(self) -> State:
        """The state without what depends on how fast and how busy the machine is."""
        return worst(verdict.state for verdict in self.verdicts if verdict.name not in TIMED)


def judge(
    events: Sequence[Event], bounds: Bounds, reference: Reference | None = None, sees_processes: bool = True
) -> RunJudgement:
    """Judges a history. Without a `reference` its own undisturbed phase has the answers that are right.

    Nothing is said of processes where the target cannot see them.
    """
    operations = read_operations(events)
    expected = reference if reference is not None else reference_of(operations)
    disturbed = [o for o in operations if o.phase == "faults"]
    # A reference that was read from a file brings no gaps: then nothing is taken off.
    undisturbed = [o for o in operations if o.phase == "reference"]
    usual_s, usual_tpot_s = usual_gap_s(undisturbed), tpot_p99_s(undisturbed)
    outcomes = fault_outcomes(events, disturbed, usual_s)
    missed = [event for event in events if isinstance(event, FaultSkipped)]
    since_s, until_s = _load_time(events, disturbed)
    speed = throughput(events, outcomes, since_s, until_s)
    verdicts = [
        *token_verdicts(disturbed, expected),
        *([salt_verdict(disturbed)] if any(operation.is_salted for operation in disturbed) else []),
        *end_verdicts(disturbed, bounds.max_refused),
        _hit_verdict(outcomes, missed),
        _stall_verdict(outcomes, bounds.stall_s),
        *([_tpot_verdict(outcomes, usual_tpot_s, bounds.tpot_ratio)] if bounds.tpot_ratio else []),
        _first_token_verdict(disturbed, bounds.first_token_s),
        _recovery_verdict(outcomes, bounds.recovery_s),
        _throughput_verdict(speed, outcomes, bounds.throughput_share),
        *leak_verdicts(events, bounds.leaks, sees_processes),
    ]
    if any(outcome.kind in bounds.harmless for outcome in outcomes):
        verdicts.append(_false_deaths_verdict(events, outcomes, bounds.harmless))
    return RunJudgement(
        verdicts=tuple(verdicts),
        outcomes=tuple(outcomes),
        skipped=tuple(missed),
        throughput=speed,
        usual_gap_s=usual_s,
        usual_tpot_s=usual_tpot_s,
        sha256_with_faults=digest_with_faults(disturbed),
        sha256_without_faults=digest_without_faults(disturbed, expected),
    )


def bound_for(bounds: Mapping[str, float], kind: str, victim_kinds: Sequence[str]) -> float:
    """Returns the bound of a fault: the largest of its victims' kinds, else the kind's, else the default."""
    exact = [bounds[f"{kind}/{victim}"] for victim in victim_kinds if f"{kind}/{victim}" in bounds]
    if exact and len(exact) == len(victim_kinds):
        return max(exact)
    return max([bounds.get(kind, bounds[DEFAULT]), *exact])


def _load_time(events: Sequence[Event], disturbed: Sequence[Operation]) -> tuple[float, float]:
    """Returns when the first token under faults came and when the clients were told to ask no more."""
    since_s = min((o.arrivals_s[0] for o in disturbed if o.arrivals_s), default=0.0)
    finish = [event.at_s for event in events if isinstance(event, PhaseBegan) and event.phase == "finish"]
    return since_s, max(since_s, min(finish, default=since_s))


def _hit_verdict(outcomes: Sequence[FaultOutcome], missed: Sequence[FaultSkipped]) -> Verdict:
    doubts = [f"{outcome.title}: {doubt}" for outcome in outcomes for doubt in outcome.doubts]
    doubts += [f"fault {m.fault} ({m.kind}) was not applied: {m.reason}" for m in missed if not m.is_expected]
    if not outcomes:
        doubts.insert(0, "no fault was applied")
    figures = {"applied": float(len(outcomes)), "skipped": float(len(missed))}
    return verdict_of("faults_hit", [], doubts, f"each of {len(outcomes)} faults hit work in flight", figures)


def _stall_verdict(outcomes: Sequence[FaultOutcome], bounds: Mapping[str, float]) -> Verdict:
    damage = []
    for outcome in outcomes:
        # What holds while a copy is left does not hold for several at once.
        bound_s = bound_for(bounds, outcome.kind, outcome.victim_kinds if outcome.is_alone else ())
        if outcome.gap_p99_s > bound_s:
            late_s = outcome.harness_late_s
            own = f"; the harness itself stood still for {late_s:.2f} s meanwhile" if late_s else ""
            damage.append(
                f"{outcome.title}: longest extra gap {outcome.gap_p99_s:.2f} s (p99), the bound is {bound_s:g} s{own}"
            )
    hit = [outcome for outcome in outcomes if outcome.has_hit]
    gaps = [outcome.gap_p99_s for outcome in hit]
    figures = {
        "extra_gap_p50_s": percentile([outcome.gap_p50_s for outcome in hit], 0.5),
        "extra_gap_p99_s": percentile(gaps, 0.99),
        "extra_gap_max_s": max((outcome.gap_max_s for outcome in hit), default=0.0),
    }
    doubts = [] if hit else ["no fault is known to have hit work in flight"]
    return verdict_of("stalls", damage, doubts, f"longest extra gap {max(gaps, default=0.0):.2f} s (p99)", figures)


def _tpot_verdict(outcomes: Sequence[FaultOutcome], usual_s: float, bounds: Mapping[str, float]) -> Verdict:
    damage, ratios = [], []
    for outcome in outcomes:
        if outcome.kind not in bounds or not (usual_s and outcome.tpot_p99_s):
            continue
        ratios.append(outcome.tpot_p99_s / usual_s)
        if ratios[-1] > bounds[outcome.kind]:
            damage.append(
                f"{outcome.title}: {outcome.tpot_p99_s * 1000:.0f} ms/token (p99), {ratios[-1]:.2f} times the usual "
                f"{usual_s * 1000:.0f} ms; the bound is {bounds[outcome.kind]:g} times"
            )
    doubts = [] if ratios else ["no such fault came, or no answer was under way beside it, or before"]
    worst_ratio = max(ratios, default=0.0)
    held = f"at most {worst_ratio:.2f} times the usual {usual_s * 1000:.0f} ms/token (p99) beside {', '.join(bounds)}"
    return verdict_of("tpot", damage, doubts, held, {"tpot_ratio_max": worst_ratio})


def _first_token_verdict(disturbed: Sequence[Operation], bound_s: float) -> Verdict:
    waits = {o.name: o.arrivals_s[0] - o.asked_s for o in disturbed if o.arrivals_s}
    late = [f"{name}: {wait_s:.1f} s until its first token" for name, wait_s in waits.items() if wait_s > bound_s]
    doubts = [] if waits else ["no request got a token"]
    longest_s = max(waits.values(), default=0.0)
    held = f"the longest wait for a first token was {longest_s:.2f} s"
    return verdict_of("first_tokens", late, doubts, held, {"first_token_max_s": longest_s})


def _recovery_verdict(outcomes: Sequence[FaultOutcome], bounds: Mapping[str, float]) -> Verdict:
    damage, times = [], []
    for outcome in outcomes:
        bound_s = bound_for(bounds, outcome.kind, outcome.victim_kinds)
        if outcome.recovery_s is None:
            damage.append(f"{outcome.title}: the mesh was not whole again")
        else:
            times.append(outcome.recovery_s)
            if outcome.recovery_s > bound_s:
                damage.append(f"{outcome.title}: whole after {outcome.recovery_s:.1f} s, the bound is {bound_s:g} s")
    doubts = [] if outcomes else ["no fault was applied"]
    figures = {"recovery_p50_s": percentile(times, 0.5), "recovery_max_s": max(times, default=0.0)}
    held = f"whole again within {max(times, default=0.0):.1f} s of healing each time"
    return verdict_of("recovery", damage, doubts, held, figures)


def _throughput_verdict(speed: Throughput, outcomes: Sequence[FaultOutcome], share: float | None) -> Verdict:
    figures = {"inside_tokens_per_s": speed.inside, "outside_tokens_per_s": speed.outside}
    held = f"{speed.inside:.0f} tokens/s in fault windows ({speed.inside_s:.0f} s), {speed.outside:.0f} outside"
    doubts = []
    if share is not None and not (speed.outside and outcomes):
        doubts.append("there is nothing outside or nothing inside fault windows to compare")
    is_slow = share is not None and speed.outside > 0 and speed.inside < share * speed.outside
    damage = [f"{held}: less than {share:.0%}"] if is_slow else []
    return verdict_of("throughput", damage, doubts, held, figures)


def _false_deaths_verdict(
    events: Sequence[Event], outcomes: Sequence[FaultOutcome], harmless: Sequence[str]
) -> Verdict:
    seen = [event for event in events if isinstance(event, NodesSeen)]
    damage = []
    for outcome in outcomes:
        if outcome.kind not in harmless:
            continue
        until_s = outcome.healed_s if outcome.healed_s is not None else outcome.until_s
        beside = [o for o in outcomes if o is not outcome and outcome.applied_s <= o.applied_s <= until_s]
        hurt = {node.name for other in beside for node in other.victims}
        before = [event.nodes for event in seen if event.at_s <= outcome.applied_s]
        known = {(node.name, node.pid) for node in (before[-1] if before else ()) if node.name not in hurt}
        for event in seen:
            if not outcome.applied_s < event.at_s <= until_s:
                continue
            gone = sorted(name for name, pid in known - {(node.name, node.pid) for node in event.nodes})
            if gone:
                damage.append(f"{outcome.title}: {', '.join(gone)} ended or was replaced, and nothing had hurt it")
    doubts = [] if seen else ["running processes were not observed"]
    return verdict_of("false_deaths", damage, doubts, "no process was replaced that nothing had hurt")
