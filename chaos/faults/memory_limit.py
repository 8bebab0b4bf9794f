"""Out of memory: the kernel kills the node, as it does when a neighbour in the same container has taken all.

The node's control group is limited to a little more than it uses, and a process of ours that the kernel never chooses
takes that up. A lower limit alone would do it only in control groups of version 2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.target import Node, Target, TargetError
from chaos.targets.cgroups import ControlGroup, group_of, unavailable
from chaos.undo import UndoList

_EATER = """
import os, sys, time
open("/proc/self/oom_score_adj", "w").write("-1000")
open(sys.argv[1], "w").write(str(os.getpid()))
parent, eaten = os.getppid(), []
while os.getppid() == parent:
    eaten.append(bytearray(b"x" * (4 << 20)))
    time.sleep(0.002)
"""
WITHIN_S = 20.0


class MemoryLimit:
    """Of each victim: its use now and `headroom_mib`. The process is killed within seconds; what restarts it starts it
    without a limit."""

    name = "memory_limit"
    needs = frozenset({"processes"})

    def __init__(self, headroom_mib: int) -> None:
        self.headroom_mib = headroom_mib
        self._undo = UndoList()

    def unavailable(self, target: Target) -> str:
        return unavailable("memory") or ("" if os.geteuid() == 0 else "only root may keep a process from being chosen")

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            group = group_of(victim, "memory", self._undo)
            limit, used = (
                ("memory.max", "memory.current")
                if group.is_version_2
                else (
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                )
            )
            used_bytes = int(group.read(used))
            before = group.write(limit, str(used_bytes + (self.headroom_mib << 20)))
            self._undo.add(group.restore, limit, "-1" if limit == "memory.limit_in_bytes" else before)
            self._eat(group, victim)

    def heal(self, target: Target) -> None:
        self._undo.run()

    def _eat(self, group: ControlGroup, victim: Node) -> None:
        eater = subprocess.Popen(
            [sys.executable, "-S", "-c", _EATER, str(group.folder / "cgroup.procs")],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        thread = threading.Thread(target=_end_after, args=(eater, victim.pid), name="memory-eater", daemon=True)
        thread.start()
        self._undo.add(_end, eater, thread)


def _end_after(eater: subprocess.Popen[bytes], pid: int) -> None:
    """The eater goes when its victim has gone, or has not gone in time: the next process must find memory."""
    deadline_s = time.monotonic() + WITHIN_S
    while _lives(pid) and eater.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.002)
    eater.kill()
    eater.wait()


def _end(eater: subprocess.Popen[bytes], thread: threading.Thread) -> None:
    eater.kill()
    thread.join(WITHIN_S)
    if thread.is_alive():
        raise TargetError(f"process {eater.pid}, which takes up memory, does not end")


def _lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def make_memory_limit(parameters: Mapping[str, Any]) -> MemoryLimit:
    """`headroom_mib` above what is used."""
    given = Parameters(parameters)
    fault = MemoryLimit(given.whole("headroom_mib", 8, 1, 4096))
    given.done()
    return fault
