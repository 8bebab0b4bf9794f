"""Up to which step everything is done. Pure.

Steps come in ascending order and may end in another one, since a batch whose expert answers are in overtakes one that
waits. The *mark* is the newest step with nothing unfinished at or before it.
"""

from __future__ import annotations

from collections import OrderedDict


class StepMarks:
    """Steps of one slot, over all generations: step numbers are unique and ascend over them."""

    def __init__(self, mark: int = 0) -> None:
        self.mark = mark
        self._newest = mark
        self._unfinished: OrderedDict[int, None] = OrderedDict()

    def begin(self, step: int) -> None:
        """It has come."""
        self._newest = max(self._newest, step)
        self._unfinished[step] = None

    def finish(self, step: int) -> None:
        """What it had to write is written. One that is not known is no error: a new generation dropped it."""
        self._unfinished.pop(step, None)
        self._advance()

    def drop_unfinished(self) -> None:
        """A new generation: what is under way will never be answered, so nobody counts on it."""
        self._unfinished.clear()
        self._advance()

    def _advance(self) -> None:
        oldest = next(iter(self._unfinished), None)
        # Numbers between two steps of this pipeline belong to others.
        self.mark = max(self.mark, self._newest if oldest is None else oldest - 1)
