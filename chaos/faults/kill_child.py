"""A child of a node is killed by SIGKILL: a rank of a stage, or the process below a container's init."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from chaos.faults.base import Fault
from chaos.faults.processes import children, descendants
from chaos.target import Node, Target, TargetError


class KillChild(Fault):
    """The newest descendant of each victim is killed; a node without children cannot be hurt by it."""

    name = "kill_child"

    def unavailable(self, target: Target) -> str:
        is_told = Path("/proc/self/task").exists()
        return "" if is_told else "this system has no /proc, which tells a process's children"

    def can_hurt(self, node: Node) -> bool:
        return bool(children(node.pid))

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for child in newest_children(victims):
            os.kill(child, signal.SIGKILL)


def newest_children(victims: Sequence[Node]) -> list[int]:
    """Returns one process below each victim, which has no children itself: what forks ranks is not one itself.

    Raises TargetError for a victim without children, before any is hurt.
    """
    found: list[int] = []
    for victim in victims:
        pids = [pid for pid in descendants(victim.pid) if not children(pid)]
        if not pids:
            raise TargetError(f"{victim.name} has no child process")
        found.append(max(pids))
    return found
