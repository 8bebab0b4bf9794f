"""How much memory a node may offer."""

from __future__ import annotations

from pathlib import Path

_OFFERED_SHARE = 0.8
_FALLBACK_BYTES = 4 << 30


def offered_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """80% of what is free here now, seen from inside a container as well."""
    available = _FALLBACK_BYTES
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return int(max(0, available) * _OFFERED_SHARE)
