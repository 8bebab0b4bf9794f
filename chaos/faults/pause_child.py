"""SIGSTOP for a child of a node: a rank of a stage that is there, does nothing, and is waited for."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.faults.kill_child import newest_children, no_children
from chaos.faults.parameters import Parameters
from chaos.target import Node, Target


@dataclass(slots=True)
class PauseChild:
    """The newest child of each victim. Healed by SIGCONT, unless the victim has ended it meanwhile."""

    name: str = "pause_child"
    needs: frozenset[str] = frozenset({"processes"})
    _paused: list[int] = field(default_factory=list)

    def unavailable(self, target: Target) -> str:
        return no_children(target)

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for child in newest_children(victims):
            self._paused.append(child)
            os.kill(child, signal.SIGSTOP)

    def heal(self, target: Target) -> None:
        while self._paused:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._paused.pop(), signal.SIGCONT)


def make_pause_child(parameters: Mapping[str, Any]) -> PauseChild:
    """No parameters; how long is the suite's `heal_after_s`."""
    Parameters(parameters).done()
    return PauseChild()
