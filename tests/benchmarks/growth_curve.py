"""A cost that grows with something, and whether it grows faster than that. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

NOISE = 1.07
"""Differences under 7% mean nothing."""


@dataclass(frozen=True)
class Point:
    """One measurement."""

    size: float
    cost: float
    """A time, in the curve's unit."""


@dataclass(frozen=True)
class Curve:
    """Points by ascending size."""

    name: str
    grows_with: str
    unit: str
    points: tuple[Point, ...]


def exponents(points: Sequence[Point]) -> list[float]:
    """Returns the local power of each step: 1 is linear, 0 is constant, 2 is quadratic."""
    return [
        math.log(after.cost / before.cost) / math.log(after.size / before.size) for before, after in pairwise(points)
    ]


def steps_worse_than_linear(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Returns neighbours of which the second costs more than its size over the first's, beyond noise."""
    return [
        (before, after)
        for before, after in pairwise(points)
        if after.cost / before.cost > NOISE * after.size / before.size
    ]


def verdict(curve: Curve) -> str:
    """Returns a sentence."""
    if len(curve.points) < 2:
        return "a single point says nothing"
    if worse := steps_worse_than_linear(curve.points):
        steps = ", ".join(f"{before.size:g} to {after.size:g}" for before, after in worse)
        return f"WORSE THAN LINEAR from {steps}"
    return f"never worse than linear; the steepest step is of power {max(exponents(curve.points)):.2f}"
