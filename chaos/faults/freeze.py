"""The engine freezes all processes of a container, the init too (`docker pause`)."""

from __future__ import annotations

from collections.abc import Sequence

from chaos.faults.base import Fault
from chaos.target import Node, Target, TargetError
from chaos.targets.docker_target import DockerTarget


class Freeze(Fault):
    """Unlike `pause`, this keeps the container from being ended while it lasts."""

    name = "freeze"
    needs = frozenset({"containers"})

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        if not isinstance(target, DockerTarget):
            raise TargetError("only a Docker engine freezes containers")
        for victim in victims:
            self._undo.add(target.unpause, victim)
            target.pause(victim)
