"""A node has no memory left: the kernel kills it, as it does when a neighbour in the same container has taken all.

The node's control group is limited to a little more than it uses, and a process of ours that the kernel never chooses
takes that up. A lower limit alone would do it only in control groups of version 2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from chaos.faults.base import Fault, Range
from chaos.faults.cgroups import ControlGroup, group_of, unavailable
from chaos.target import Node, Target, TargetError

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


class MemoryLimit(Fault):
    """Each victim may have what it uses now and `headroom_mib`. The process is killed within seconds; what restarts it
    starts it without a limit."""

    name = "memory_limit"
    headroom_mib: Annotated[int, Range(1, 4096)] = 8

    def unavailable(self, target: Target) -> str:
        return unavailable("memory") or ("" if os.geteuid() == 0 else "only root may keep a process from being chosen")

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            group = group_of(victim, "memory", self._undo)
            if group.is_version_2:
                limit, used_bytes = "memory.max", int(group.read("memory.current"))
            else:
                limit, used_bytes = "memory.limit_in_bytes", int(group.read("memory.usage_in_bytes"))
            before = group.write(limit, str(used_bytes + (self.headroom_mib << 20)))
            self._undo.add(group.restore, limit, before if group.is_version_2 else "-1")
            self._eat(group, victim)

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
    """Ends the eater when its victim has gone, or has not gone in time: the next process must find memory."""
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
