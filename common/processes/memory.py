"""How much memory a node may offer."""

from __future__ import annotations

from pathlib import Path

from common.processes.cgroup import memory_groups, read_entry

OFFERED_SHARE = 0.8
"""The rest is for what is not counted: activations, buffers, the libraries' own."""
_FALLBACK_BYTES = 4 << 30


def offered_bytes(proc: Path = Path("/proc"), root: Path = Path("/")) -> int:
    """80% of what is free here now: of the machine, and of every limit that this process is under.

    `root`: where paths of mounts begin.
    """
    available = read_entry(proc / "meminfo", "MemAvailable:") * 1024 or _FALLBACK_BYTES
    # Cached files count as used there, checkpoints above all; the kernel gives their memory up when asked.
    available = min([available, *(group.free_bytes for group in memory_groups(proc, root))])
    return int(max(0, available) * OFFERED_SHARE)


def offered_device_bytes(free_bytes: int, total_bytes: int, num_processes: int) -> int:
    """Of a device's own memory: 80% of what is free now, and where processes share it, no more than each one's part.

    The part is of the whole: a process that starts again beside others that have loaded must get as much as before.
    """
    return int(min(free_bytes, total_bytes // num_processes if num_processes > 1 else total_bytes) * OFFERED_SHARE)
