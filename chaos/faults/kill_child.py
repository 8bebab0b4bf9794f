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
        if not Path("/proc/self/task").exists():
            return "this system has no /proc, which tells a process's children"
        return "" if any(children(node.pid) for node in target.nodes()) else "no node has a child process"

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
            raise TargetError(f"{victim.name} has no child process; choose a kind that starts some")
        found.append(max(pids))
    return found
