"""Every victim is restarted in order, one after another, each when the one before serves again."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.faults.background import BackgroundWork
from chaos.faults.parameters import Parameters
from chaos.target import Node, Target, TargetError


@dataclass(slots=True)
class RollingRestart:
    """`pause_s`: between a node's return and the next one's turn. `within_s`: for all of it; healing waits for it."""

    pause_s: float
    timeout_s: float
    within_s: float
    clock: Callable[[], float] = time.monotonic
    name: str = "rolling_restart"
    needs: frozenset[str] = frozenset({"processes"})
    _down: list[str] = field(default_factory=list)
    _work: BackgroundWork = field(default_factory=BackgroundWork)

    def unavailable(self, target: Target) -> str:
        return ""

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        order = tuple(victims)
        self._work.begin(lambda stopped: self._restart_all(target, order, stopped))

    def heal(self, target: Target) -> None:
        try:
            self._work.finish(patience_s=self.within_s)
        finally:
            while self._down:
                target.start(self._down.pop())

    def _restart_all(self, target: Target, order: Sequence[Node], stopped: threading.Event) -> None:
        deadline_s = self.clock() + self.within_s
        for node in order:
            if stopped.is_set():
                return
            self._down.append(node.name)
            target.stop(node, self.timeout_s)
            target.start(node.name)
            self._down.remove(node.name)
            while not is_back(target, node):
                if self.clock() > deadline_s:
                    raise TargetError(f"{node.name} did not come back; the restart of the others was given up")
                if stopped.wait(0.2):
                    return
            stopped.wait(self.pause_s)


def is_back(target: Target, node: Node) -> bool:
    """Whether a new process of this name runs and the mesh says that it is ready."""
    if not any(other.name == node.name and other.pid != node.pid for other in target.nodes()):
        return False
    try:
        with urllib.request.urlopen(f"{target.url}/ready", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def make_rolling_restart(parameters: Mapping[str, Any]) -> RollingRestart:
    """`pause_s` 0 to 600, `timeout_s` 1 to 120, `within_s` 1 to 3600."""
    taken = Parameters(parameters)
    made = RollingRestart(
        taken.number("pause_s", 5.0, 0, 600),
        taken.number("timeout_s", 20.0, 1, 120),
        taken.number("within_s", 300.0, 1, 3600),
    )
    taken.done()
    return made
