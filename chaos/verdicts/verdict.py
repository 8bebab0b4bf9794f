"""What a check says: held, broken, or not known, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

MAX_EVIDENCE = 12
"""Pieces of evidence that a verdict carries; the history has the rest."""


class State(StrEnum):
    """`unknown` is said whenever the record does not show that the check could have failed."""

    HELD = "held"
    BROKEN = "broken"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One invariant's outcome. `figures` are numbers with their unit in the name."""

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
    """Broken if there is damage, else unknown if there is a doubt, else held, which `held` says in a sentence."""
    figures = figures or {}
    if damage:
        more = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
        return Verdict(name, State.BROKEN, damage[0] + more, tuple(damage[:MAX_EVIDENCE]), figures)
    if doubts:
        more = f" and {len(doubts) - 1} more" if len(doubts) > 1 else ""
        return Verdict(name, State.UNKNOWN, doubts[0] + more, tuple(doubts[:MAX_EVIDENCE]), figures)
    return Verdict(name, State.HELD, held, (), figures)


def worst(states: Iterable[State]) -> State:
    """Broken before unknown before held; of none: unknown."""
    seen = set(states)
    for state in (State.BROKEN, State.UNKNOWN, State.HELD):
        if state in seen:
            return state
    return State.UNKNOWN


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that at least this share of all values does not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = max(1, -(-round(share * len(ordered) * 1_000_000) // 1_000_000))
    return ordered[min(rank, len(ordered)) - 1]
