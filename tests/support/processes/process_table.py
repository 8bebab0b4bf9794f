"""What the operating system says about processes (Linux: /proc)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessSize:
    """One process at one moment."""

    resident_bytes: int
    private_bytes: int
    """Resident and not shared with others: mapped weights do not count."""
    num_threads: int
    num_file_descriptors: int
    cpu_s: float


def process_size(pid: int) -> ProcessSize:
    """Raises FileNotFoundError if there is no such process."""
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    resident_kib = int(status["VmRSS"].split()[0])
    # The command's name may hold blanks and brackets; fields count from behind it.
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return ProcessSize(
        resident_bytes=resident_kib * 1024,
        private_bytes=int(status["RssAnon"].split()[0]) * 1024,
        num_threads=int(status["Threads"]),
        num_file_descriptors=len(os.listdir(folder / "fd")),
        cpu_s=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
    )


def is_alive(pid: int) -> bool:
    """False also for a process that has ended and was not yet waited for."""
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] not in ("Z", "X")


def children_of(pid: int) -> list[int]:
    """Process ids of its children, ascending."""
    threads = (Path("/proc") / str(pid) / "task").iterdir()
    return sorted(int(child) for thread in threads for child in (thread / "children").read_text().split())
