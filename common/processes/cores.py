"""How many cores a process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

from common.processes.cgroup import VERSION_2, own_folders


def usable_cores(proc: Path = Path("/proc"), root: Path = Path("/")) -> int:
    """Returns how many cores this process may run on, and no more than its containers may use at a time: the quota of
    its control group or of one above it (`cpu.max` of version 2), rounded up.

    `root`: where paths of mounts begin.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    folders = [folder for folder, files in own_folders(proc, root) if files is VERSION_2]
    return max(1, min([own, *(math.ceil(_quota(folder / "cpu.max")) for folder in folders)]))


def compute_threads(setting: str) -> int:
    """Returns on how many threads a call of a kernel computes, at most: what THREADS says, where `auto` stands for
    every core that this process may use."""
    return usable_cores() if setting == "auto" else int(setting)


def _quota(path: Path) -> float:
    """Returns how many cores' time there is: microseconds of CPU time and of the period that they are for."""
    try:
        quota, period = path.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # there is no such file, or it says `max`
        return float(1 << 20)
