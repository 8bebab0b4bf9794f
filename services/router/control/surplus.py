"""When a pipeline too many is given up for the spares that the rule wants. Pure."""

from __future__ import annotations

GIVE_UP_S = 20.0
"""A process that was killed is back by then; one that was taken away on purpose is not."""


class Surplus:
    """More pipelines than floor((n - SPARES) / PP), and since when."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self.is_there = False

    def see(self, num_pipelines: int) -> None:
        """So many are beyond the rule now."""
        self.is_there = num_pipelines > 0
        if not self.is_there:
            self._since_s = None

    def is_due(self, now_s: float) -> bool:
        """Whether it has lasted. Ask again and again while `is_there`; the first time begins the wait."""
        if not self.is_there:
            return False
        if self._since_s is None:
            self._since_s = now_s
        return now_s - self._since_s >= GIVE_UP_S
