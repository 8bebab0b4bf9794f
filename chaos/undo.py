"""What a fault has to take back, in the order that it must be taken back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec

from chaos.target import TargetError

P = ParamSpec("P")


class UndoList:
    """Steps that are run once each, the last first. One that fails does not keep the others from running, and is tried
    again by the next run."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> None:
        """Remembers a call: right after what it undoes has been done, or before, where that may stop half-way."""
        self._steps.append(partial(step, *arguments, **named))

    def run(self) -> None:
        """Runs all of them. Raises TargetError with the sentences of those that failed."""
        failures, left = [], []
        while self._steps:
            step = self._steps.pop()
            try:
                step()
            except (TargetError, OSError) as error:
                failures.append(str(error))
                left.append(step)
        self._steps = left[::-1]
        if failures:
            raise TargetError("not healed: " + "; ".join(failures))
