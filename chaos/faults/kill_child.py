"""SIGKILL for a child of a node: a rank below its supervisor, or the process below a container's init."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.target import Node, Target, TargetError


@dataclass(slots=True)
class KillChild:
    """The newest descendant of each victim; a node without children cannot be hurt by it."""

    name: str = "kill_child"
    needs: frozenset[str] = frozenset({"processes"})

    def unavailable(self, target: Target) -> str:
        return no_children(target)

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for child in newest_children(victims):
            os.kill(child, signal.SIGKILL)

    def heal(self, target: Target) -> None:
        return


def no_children(target: Target) -> str:
    """Why no node of the target can be hurt by its children; "" if one can."""
    if not Path("/proc/self/task").exists():
        return "this system has no /proc, which tells a process's children"
    return "" if any(children(node.pid) for node in target.nodes()) else "no node has a child process"


def newest_children(victims: Sequence[Node]) -> list[int]:
    """One below each, which has no children itself: what forks ranks is no rank.

    Raises TargetError for a victim without children, before anybody is hurt.
    """
    found: list[int] = []
    for victim in victims:
        pids = [pid for pid in descendants(victim.pid) if not children(pid)]
        if not pids:
            raise TargetError(f"{victim.name} has no child process; choose a kind that starts some")
        found.append(max(pids))
    return found


def descendants(pid: int) -> list[int]:
    """Pids of a process's children, their children and so on."""
    below = children(pid)
    return below + [descendant for child in below for descendant in descendants(child)]


def children(pid: int) -> list[int]:
    """Pids of a process's children, the newest last; none where the process is gone or not ours to see."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return sorted(found)


def make_kill_child(parameters: Mapping[str, Any]) -> KillChild:
    """No parameters."""
    Parameters(parameters).done()
    return KillChild()
