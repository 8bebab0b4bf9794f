"""Parameters of a fault out of a suite: taken by name, checked, and nothing left over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Parameters:
    """Takes values one by one; `done` refuses what nobody took. Every refusal is a ValueError with the name."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = dict(values)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number in [low, high]."""
        value = self._left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{name}={value!r} must be a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        value = self._left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name}={value!r} must be a whole number from {low} to {high}")
        return value

    def one_of(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of some words."""
        value = self._left.pop(name, default)
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")
        return str(value)

    def done(self) -> None:
        """Nothing may be left."""
        if self._left:
            raise ValueError(f"{', '.join(sorted(self._left))}: not known here")
