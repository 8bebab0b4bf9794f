"""SIGKILL from the host: the process has no time for anything. Whoever runs the mesh restarts it, or does not."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.target import Node, Target


@dataclass(slots=True)
class Kill:
    """All victims in the same instant. Healing does nothing: the restart is the mesh's own business."""

    name: str = "kill"
    needs: frozenset[str] = frozenset({"processes"})

    def unavailable(self, target: Target) -> str:
        return ""

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            target.signal(victim, signal.SIGKILL)

    def heal(self, target: Target) -> None:
        return


def make_kill(parameters: Mapping[str, Any]) -> Kill:
    """No parameters."""
    Parameters(parameters).done()
    return Kill()
