"""The engine freezes all processes of a container, the init too (`docker pause`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.target import Node, Target, TargetError
from chaos.targets.docker_target import DockerTarget
from chaos.undo import UndoList


class Freeze:
    """Unlike `pause` the container cannot be ended while it lasts."""

    name = "freeze"
    needs = frozenset({"containers"})

    def __init__(self) -> None:
        self._undo = UndoList()

    def unavailable(self, target: Target) -> str:
        return "" if isinstance(target, DockerTarget) else "only a Docker engine freezes containers"

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        if not isinstance(target, DockerTarget):
            raise TargetError(self.unavailable(target))
        for victim in victims:
            self._undo.add(target.unpause, victim)
            target.pause(victim)

    def heal(self, target: Target) -> None:
        self._undo.run()


def make_freeze(parameters: Mapping[str, Any]) -> Freeze:
    """No parameters."""
    Parameters(parameters).done()
    return Freeze()
