"""A node gets only a share of one CPU: it lives, answers, and is slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from chaos.faults.base import Fault, Range
from chaos.faults.cgroups import group_of, unavailable
from chaos.target import Node, Target

PERIOD_US = 20_000


class CpuQuota(Fault):
    """Each victim gets `percent` of one CPU, in slices of PERIOD_US."""

    name = "cpu_quota"
    percent: Annotated[float, Range(5, 10_000)] = 20

    def unavailable(self, target: Target) -> str:
        return unavailable("cpu")

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        quota_us = str(max(1000, round(PERIOD_US * self.percent / 100)))
        for victim in victims:
            group = group_of(victim, "cpu", self._undo)
            if group.is_version_2:
                limits = [("cpu.max", f"{quota_us} {PERIOD_US}")]
            else:
                limits = [("cpu.cfs_period_us", str(PERIOD_US)), ("cpu.cfs_quota_us", quota_us)]
            for name, value in limits:
                self._undo.add(group.restore, name, group.write(name, value))
