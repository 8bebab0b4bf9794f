"""A run over time as a PNG: tokens a second, requests in flight, faults as bands, each recovery beside its fault.

It is a file of its own since it imports matplotlib, which takes a second.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chaos.record.history import Event, Tokens
from chaos.record.operations import Operation, read_operations
from chaos.verdicts.fault_outcomes import FaultOutcome

BIN_S = 0.5
MAX_LABELS = 60
"""More faults than these are drawn without words."""


def tokens_per_second(events: Sequence[Event], end_s: float) -> list[float]:
    """Returns them by bins of BIN_S from 0 on."""
    bins = [0.0] * (int(end_s / BIN_S) + 1)
    for event in events:
        if isinstance(event, Tokens) and 0 <= event.at_s <= end_s:
            bins[int(event.at_s / BIN_S)] += len(event.token_ids) / BIN_S
    return bins


def requests_in_flight(operations: Sequence[Operation], end_s: float) -> list[tuple[float, int]]:
    """Returns (time, number from then on), in the order of time."""
    changes = [(operation.asked_s, 1) for operation in operations]
    changes += [(operation.ended_s, -1) for operation in operations if operation.ended_s is not None]
    points, number = [(0.0, 0)], 0
    for at_s, change in sorted(changes):
        number += change
        points.append((at_s, number))
    return [*points, (end_s, number)]


def timeline_png(events: Sequence[Event], outcomes: Sequence[FaultOutcome], title: str) -> bytes:
    """Draws the picture."""
    end_s = max((event.at_s for event in events), default=1.0)
    figure = Figure(figsize=(min(40.0, max(11.0, end_s / 12)), 6.5), layout="constrained")
    speed, flight = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = tokens_per_second(events, end_s)
    speed.step([BIN_S * number for number in range(len(bins))], bins, where="post", color="#1f4e79", linewidth=1)
    speed.set_ylabel("tokens/s")
    speed.set_ylim(0, max(bins) * 1.5 or 1.0)
    speed.set_title(title)
    times, numbers = zip(*requests_in_flight(read_operations(events), end_s), strict=True)
    flight.step(times, numbers, where="post", color="#555555", linewidth=1)
    flight.set_ylabel("in flight")
    flight.set_xlabel("seconds since the run began")
    flight.set_xlim(0, end_s)
    for axes in (speed, flight):
        _draw_faults(axes, outcomes)
    if len(outcomes) <= MAX_LABELS:
        _label_faults(speed, outcomes, max(bins) * 1.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_faults(axes: Axes, outcomes: Sequence[FaultOutcome]) -> None:
    for outcome in outcomes:
        healed_s = outcome.healed_s if outcome.healed_s is not None else outcome.until_s
        axes.axvspan(
            outcome.applied_s, max(healed_s, outcome.applied_s + 0.1), color="#c0392b", alpha=0.35, linewidth=0
        )
        if outcome.whole_s is not None:
            axes.axvspan(healed_s, outcome.whole_s, color="#e6b35a", alpha=0.25, linewidth=0)


def _label_faults(axes: Axes, outcomes: Sequence[FaultOutcome], top: float) -> None:
    for outcome in outcomes:
        names = ", ".join(node.name for node in outcome.victims[:2]) + (" ..." if len(outcome.victims) > 2 else "")
        words = f"{outcome.kind} {names}  gap +{outcome.gap_p99_s:.1f} s"
        if outcome.recovery_s is not None:
            words += f", whole {outcome.recovery_s:.1f} s"
        axes.text(outcome.applied_s, top * 0.99, words, rotation=90, va="top", ha="left", fontsize=6)
