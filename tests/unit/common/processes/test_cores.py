"""THREADS=auto is what this process may use: cores by its affinity, within the quota of its containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.processes.cores import usable_cores


def with_quotas(root: Path, *quotas: str) -> Path:
    """Groups within each other, outermost first, in what stands in place of /."""
    names = [f"g{number}" for number in range(1, len(quotas))]
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"0::/{'/'.join(names)}\n")
    (root / "proc/self/mountinfo").write_text("1 2 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n")
    for depth, quota in enumerate(quotas):
        folder = root.joinpath("sys/fs/cgroup", *names[:depth])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{quota}\n")
    return root


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        (("max 100000",), 8),
        (("max 100000", "200000 100000"), 2),
        (("150000 100000", "max 100000"), 2),
        (("300000 100000", "50000 100000"), 1),
        (("1600000 100000",), 8),
        (("nonsense",), 8),
        ((), 8),
    ],
)
def test_the_narrowest_quota_counts_rounded_up(
    quotas: tuple[str, ...], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    root = with_quotas(tmp_path, *quotas) if quotas else tmp_path
    assert usable_cores(root / "proc", root) == cores
