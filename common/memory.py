"""How much memory a node may offer."""

from __future__ import annotations

from pathlib import Path

OFFERED_SHARE = 0.8
"""The rest is for what is not counted: activations, buffers, the libraries' own."""
_FALLBACK_BYTES = 4 << 30


def offered_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """80% of what is free here now, seen from inside a container as well."""
    available = _FALLBACK_BYTES
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used, parts = (cgroup / name for name in ("memory.max", "memory.current", "memory.stat"))
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        # Cached files count as used there, checkpoints above all; the kernel gives their memory to whoever asks.
        reclaimable = _entry(parts.read_text(), "inactive_file") if parts.exists() else 0
        available = min(available, int(text) - int(used.read_text()) + reclaimable)
    return int(max(0, available) * OFFERED_SHARE)


def offered_device_bytes(free_bytes: int, total_bytes: int, num_processes: int) -> int:
    """Of a device's own memory: 80% of what is free now, and where processes share it, no more than each one's part.

    The part is of the whole: a process that starts again beside others that have loaded must get as much as before.
    """
    return int(min(free_bytes, total_bytes // num_processes if num_processes > 1 else total_bytes) * OFFERED_SHARE)


def _entry(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} ")), 0)
