"""All victims are restarted one after another, each when the one before serves again."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Sequence
from typing import Annotated

from chaos.faults.background import BackgroundFault
from chaos.faults.base import Range
from chaos.target import Node, Target, TargetError


class RollingRestart(BackgroundFault):
    """Each victim gets `timeout_s` to leave in order; `pause_s` after its return it is the next one's turn. All of it
    must be done within `within_s`, and healing waits for that."""

    name = "rolling_restart"
    pause_s: Annotated[float, Range(0, 600)] = 5
    timeout_s: Annotated[float, Range(1, 120)] = 20
    within_s: Annotated[float, Range(1, 3600)] = 300

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        self._begin(lambda: self._restart_all(target, victims), patience_s=self.within_s)

    def _restart_all(self, target: Target, victims: Sequence[Node]) -> None:
        deadline_s = time.monotonic() + self.within_s
        for node in victims:
            if self._stopped.is_set():
                return
            self._undo.add(target.start, node.name)
            target.stop(node, self.timeout_s)
            self._undo.run()
            while not is_back(target, node):
                if time.monotonic() > deadline_s:
                    raise TargetError(f"{node.name} did not come back; the restart of the others was given up")
                if self._stopped.wait(0.2):
                    return
            self._stopped.wait(self.pause_s)


def is_back(target: Target, node: Node) -> bool:
    """Returns whether a new process of this name runs and the mesh says that it is ready."""
    if not any(other.name == node.name and other.pid != node.pid for other in target.nodes()):
        return False
    try:
        with urllib.request.urlopen(f"{target.url}/ready", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
