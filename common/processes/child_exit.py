"""How a child process has ended, as a sentence for people. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from common.processes.cgroup import MemoryGroup


def describe_exit(status: int, said: str, memory_kills: int, groups: Sequence[MemoryGroup]) -> str:
    """Returns what became of it, and why as far as that can be known.

    `status`: as `subprocess.Popen.poll` has it. `said`: the last line of its log, which is the reason only where it has
    ended by itself. `memory_kills`: processes that the kernel has ended for want of memory here since it started.
    `groups`: the limits that it is under.
    """
    if status > 0:
        return f"{said} (exit status {status})" if status != 1 else said
    if status == 0:
        return f"it ended by itself; its log ends with: {said}"
    number = -status
    name = signal.Signals(number).name if number in tuple(signal.Signals) else "unknown to this system"
    ended = f"it was ended by signal {number} ({name})"
    if number != signal.SIGKILL:
        return f"{ended}; its log ends with: {said}"
    return f"{ended}{_why_killed(memory_kills, groups)}"


def last_sentence(log: str) -> str:
    """Returns what a log ends with: the sentence for people where there is one."""
    lines = [line for line in log.splitlines() if line.strip()]
    plain = [line for line in lines if line.startswith("moemesh ")]
    return (plain or lines or ["(it wrote no log)"])[-1][:1000]


def _why_killed(memory_kills: int, groups: Sequence[MemoryGroup]) -> str:
    tightest = min(groups, key=lambda group: group.limit_bytes, default=None)
    limit = f"; the limit is {tightest.limit_bytes / 2**30:.2f} GiB ({tightest.folder})" if tightest else ""
    if memory_kills:
        return f" for want of memory{limit}. Offer less (CAPACITY_BYTES), start fewer processes, or raise the limit"
    return f": by a person or program, or by the kernel, likely for want of memory{limit}"
