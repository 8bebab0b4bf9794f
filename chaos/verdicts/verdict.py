"""What a check says: held, broken, or not known, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

MAX_EVIDENCE = 12
"""A verdict carries no more pieces of evidence than these; the history has the rest."""


class State(StrEnum):
    """What a check found; `unknown` means that the record does not show that it could have failed."""

    HELD = "held"
    BROKEN = "broken"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one check. `figures` are numbers with their unit in the name."""

    name: str
    state: State
    sentence: str
    evidence: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


def verdict_of(
    name: str,
    damage: Sequence[str],
    doubts: Sequence[str],
    held: str,
    figures: Mapping[str, float] | None = None,
) -> Verdict:
    """Says broken if there is damage, else unknown if there is a doubt, else held, with `held` as its sentence."""
    for state, evidence in ((State.BROKEN, damage), (State.UNKNOWN, doubts)):
        if evidence:
            more = f" and {len(evidence) - 1} more" if len(evidence) > 1 else ""
            return Verdict(name, state, evidence[0] + more, tuple(evidence[:MAX_EVIDENCE]), figures or {})
    return Verdict(name, State.HELD, held, (), figures or {})


def worst(states: Iterable[State]) -> State:
    """Returns the worst of them: broken, then unknown, then held. Of none it is unknown."""
    order = (State.BROKEN, State.UNKNOWN, State.HELD)
    return min(states, key=order.index, default=State.UNKNOWN)


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least this share of all values does not exceed (nearest rank); 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = max(1, -(-round(share * len(ordered) * 1_000_000) // 1_000_000))
    return ordered[min(rank, len(ordered)) - 1]
