"""A node gets only a share of one CPU: it lives, answers, and is slow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.target import Node, Target
from chaos.targets.cgroups import group_of, unavailable
from chaos.undo import UndoList

PERIOD_US = 20_000


class CpuQuota:
    """`percent` of one CPU for each victim, in slices of PERIOD_US."""

    name = "cpu_quota"
    needs = frozenset({"processes"})

    def __init__(self, percent: float) -> None:
        self.percent = percent
        self._undo = UndoList()

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

    def heal(self, target: Target) -> None:
        self._undo.run()


def make_cpu_quota(parameters: Mapping[str, Any]) -> CpuQuota:
    """`percent` of one CPU."""
    given = Parameters(parameters)
    fault = CpuQuota(given.number("percent", 20.0, 5.0, 10_000.0))
    given.done()
    return fault
