"""What each fault did to the streams: stall, recovery, throughput. Pure: events and operations in, outcomes out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from chaos.record.history import Event, FaultApplied, FaultHealed, HarnessLate, MeshWhole, Tokens
from chaos.record.operations import Operation
from chaos.target import Node
from chaos.verdicts.verdict import percentile

NOTICEABLE_S = 0.05
"""A gap that is longer than the usual longest by less than this is not a stall."""
NOTICED_WITHIN_S = 2.0
"""A stall that begins later than this after a fault has another cause: a node that comes back, for example."""


@dataclass(frozen=True, slots=True)
class FaultOutcome:
    """One fault that was applied. Seconds since the run began, durations in seconds."""

    number: int
    kind: str
    victims: tuple[Node, ...]
    parameters: dict[str, Any]
    applied_s: float
    healed_s: float | None
    whole_s: float | None
    until_s: float
    """What is seen until then is put down to this fault."""
    num_streams: int
    """It counts the streams that were getting tokens when the fault came."""
    num_alive: int
    gap_p50_s: float
    gap_p99_s: float
    """The longest time without a token, less the usual longest one, over the answers that were under way until the
    mesh was whole."""
    gap_max_s: float
    tokens_again_s: float
    """From the fault until the last of the streams that stalled at once got a token again; 0 if none did."""
    doubts: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    """What each of the victims was for, in their order; empty where that is not known."""
    is_alone: bool = True
    """It hurt one node at most, and no other fault was being recovered from meanwhile."""
    tpot_p99_s: float = 0.0
    """Seconds a token of the same answers, each as a whole."""
    harness_late_s: float = 0.0
    """The longest time that the harness itself stood still meanwhile; a gap may be its own."""
    remark: str = ""
    """What it has done, where that showed only after it was put on."""

    @property
    def has_hit(self) -> bool:
        """It is true where the record shows that work in flight was hit."""
        return not self.doubts

    @property
    def recovery_s(self) -> float | None:
        """The time from healing until the mesh was whole; None if it never was."""
        return None if self.whole_s is None or self.healed_s is None else max(0.0, self.whole_s - self.healed_s)

    @property
    def title(self) -> str:
        names = ", ".join(node.name for node in self.victims) or "the mesh"
        return f"fault {self.number} ({self.kind} of {names})"

    @property
    def victim_kinds(self) -> tuple[str, ...]:
        return tuple(sorted({node.kind for node in self.victims}))


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens a second inside fault windows, while faults hurt or were being recovered from, and outside."""

    inside: float
    outside: float
    inside_s: float
    outside_s: float


@dataclass(slots=True)
class _Times:
    healed: dict[int, FaultHealed] = field(default_factory=dict)
    whole: dict[int, float] = field(default_factory=dict)


def usual_gap_s(operations: Sequence[Operation]) -> float:
    """Returns the median over undisturbed answers of the longest time between two tokens; 0 if there are none."""
    longest = [max((later - earlier for earlier, later in o.gaps()), default=0.0) for o in operations if o.is_whole]
    return median(longest) if longest else 0.0


def tpot_p99_s(operations: Sequence[Operation]) -> float:
    """Returns the p99 of seconds a token after the first, over answers with half of their tokens; 0 without any.

    In an answer of five tokens one gap is the time a token: gaps are for the stalls to judge.
    """
    times = [
        (o.arrivals_s[-1] - o.arrivals_s[0]) * len(o.choices) / (o.num_tokens - len(o.choices))
        for o in operations
        if o.num_tokens > max(len(o.choices), o.max_tokens * len(o.choices) // 2)
    ]
    return percentile(times, 0.99)


def _end_of(operation: Operation) -> float:
    return operation.ended_s if operation.ended_s is not None else math.inf


def fault_outcomes(events: Sequence[Event], operations: Sequence[Operation], usual_s: float) -> list[FaultOutcome]:
    """Says of each fault what it did. `operations` were asked under faults; a gap of `usual_s` is usual without any."""
    applied = [event for event in events if isinstance(event, FaultApplied)]
    lates = [event for event in events if isinstance(event, HarnessLate)]
    times = _Times()
    for event in events:
        if isinstance(event, FaultHealed):
            times.healed.setdefault(event.fault, event)
        elif isinstance(event, MeshWhole):
            times.whole.setdefault(event.fault, event.at_s)
    end_s = max((event.at_s for event in events), default=0.0)
    next_s = {fault.fault: _next_after(fault, applied, times, end_s) for fault in applied}
    spans = {fault.fault: (fault.at_s, times.whole.get(fault.fault, next_s[fault.fault])) for fault in applied}
    found = []
    for fault in applied:
        begin_s, whole_s = spans[fault.fault]
        others = [span for number, span in spans.items() if number != fault.fault]
        is_alone = len(fault.victims) <= 1 and not any(b < whole_s and begin_s < e for b, e in others)
        outcome = _outcome(fault, times, next_s[fault.fault], operations, usual_s, is_alone)
        late_s = [late.late_s for late in lates if begin_s <= late.at_s and late.at_s - late.late_s <= outcome.until_s]
        found.append(replace(outcome, harness_late_s=max(late_s, default=0.0)))
    return found


def _next_after(fault: FaultApplied, applied: Sequence[FaultApplied], times: _Times, end_s: float) -> float:
    """Returns when the next fault came that did not overlap this one."""
    healed = times.healed.get(fault.fault)
    healed_s = end_s if healed is None else healed.at_s
    later = [other.at_s for other in applied if other.at_s > max(fault.at_s, healed_s)]
    return min(later, default=end_s)


def _outcome(
    fault: FaultApplied,
    times: _Times,
    next_s: float,
    operations: Sequence[Operation],
    usual_s: float,
    is_alone: bool,
) -> FaultOutcome:
    healed, whole_s = times.healed.get(fault.fault), times.whole.get(fault.fault)
    active = [o for o in operations if o.was_streaming(fault.at_s)]
    # Also those that began later: a rolling restart lasts longer than an answer.
    busy_until_s = max(fault.at_s, whole_s if whole_s is not None else next_s)
    beside = [o for o in operations if o.arrivals_s and o.arrivals_s[0] <= busy_until_s and _end_of(o) > fault.at_s]
    # Until the next fault: a stream may still wait when the nodes are all there again.
    touching = [_gaps_between(operation, fault.at_s, next_s) for operation in beside]
    gaps = [max([0.0, *(end_s - begin_s - usual_s for begin_s, end_s in pauses)]) for pauses in touching]
    at_once = [gap for operation, gap in zip(beside, gaps, strict=True) if operation.was_streaming(fault.at_s)]
    at_first = [gap for pauses in touching for gap in pauses if gap[0] < fault.at_s + NOTICED_WITHIN_S]
    again_s = [end_s for begin_s, end_s in at_first if end_s - begin_s > usual_s + NOTICEABLE_S]
    return FaultOutcome(
        number=fault.fault,
        kind=fault.kind,
        victims=fault.victims,
        parameters=fault.parameters,
        applied_s=fault.at_s,
        healed_s=None if healed is None else healed.at_s,
        whole_s=whole_s,
        until_s=next_s,
        num_streams=len(active),
        num_alive=len(fault.alive),
        gap_p50_s=percentile(gaps, 0.5),
        # Where many answers came and went beside it, those that it hit at once must not be lost among them.
        gap_p99_s=max(percentile(gaps, 0.99), percentile(at_once, 0.99)),
        gap_max_s=max(gaps, default=0.0),
        tokens_again_s=max(again_s, default=fault.at_s) - fault.at_s,
        doubts=tuple(_doubts(fault, healed, len(active))),
        roles=fault.roles,
        is_alone=is_alone,
        tpot_p99_s=tpot_p99_s(beside),
        remark="" if healed is None else healed.remark,
    )


def _doubts(fault: FaultApplied, healed: FaultHealed | None, num_active: int) -> Iterator[str]:
    if not num_active:
        yield "no stream was getting tokens when it came"
    if not fault.alive and fault.victims:
        yield "none of its victims lived when it came"
    if fault.roles and set(fault.roles) == {"spare"}:
        yield "its victims were spares, which have no part in any answer"
    if healed is not None and healed.doubt:
        yield healed.doubt


def _gaps_between(operation: Operation, since_s: float, until_s: float) -> list[tuple[float, float]]:
    """Returns times without tokens that touch a window, until its end: what comes after is the next window's."""
    gaps = list(operation.gaps())
    if operation.ended_s is None:
        gaps.append((operation.arrivals_s[-1], until_s))  # it waits still
    return [(begin_s, min(end_s, until_s)) for begin_s, end_s in gaps if end_s > since_s and begin_s < until_s]


def throughput(events: Sequence[Event], outcomes: Sequence[FaultOutcome], since_s: float, until_s: float) -> Throughput:
    """Counts between two times. A fault's window ends when it is healed, the mesh is whole and all streams go on."""
    windows = _merge(sorted((o.applied_s, min(until_s, _window_end(o))) for o in outcomes))
    inside_s = sum(end - begin for begin, end in windows)
    num_inside = num_all = 0
    for event in events:
        if isinstance(event, Tokens) and since_s <= event.at_s <= until_s:
            num_all += len(event.token_ids)
            if any(begin <= event.at_s <= end for begin, end in windows):
                num_inside += len(event.token_ids)
    outside_s = max(0.0, until_s - since_s - inside_s)
    return Throughput(
        inside=num_inside / inside_s if inside_s else 0.0,
        outside=(num_all - num_inside) / outside_s if outside_s else 0.0,
        inside_s=inside_s,
        outside_s=outside_s,
    )


def _window_end(outcome: FaultOutcome) -> float:
    ends = [outcome.healed_s, outcome.whole_s, outcome.applied_s + outcome.tokens_again_s]
    if outcome.whole_s is None:
        ends.append(outcome.until_s)
    return max(end for end in ends if end is not None)


def _merge(windows: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in windows:
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
