"""What a fault has to take back, in the order that it must be taken back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec

from chaos.target import TargetError

P = ParamSpec("P")


class UndoList:
    """Steps that are run once each, the last first. One that fails does not keep the others from running."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> None:
        """Remember a call: right after what it undoes has been done, or before, where that may stop half-way."""
        self._steps.append(partial(step, *arguments, **named))

    def run(self) -> None:
        """All of them; afterwards there are none. Raises TargetError with the sentences of those that failed."""
        failures = []
        while self._steps:
            try:
                self._steps.pop()()
            except (TargetError, OSError) as error:
                failures.append(str(error))
        if failures:
            raise TargetError("not healed: " + "; ".join(failures))
