"""Processes of our own that take CPU time: the mesh is slow and healthy, and nobody may be declared dead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.target import Node, Target

# It ends by itself when its parent has gone: a harness that is killed leaves no load behind.
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))\n"


@dataclass(slots=True)
class CpuHog:
    """`per_cpu` busy processes for each CPU of this machine, on top of the mesh: 1.0 and a busy mesh make 2 x."""

    per_cpu: float
    name: str = "cpu_hog"
    needs: frozenset[str] = frozenset({"processes"})
    _hogs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def unavailable(self, target: Target) -> str:
        return ""

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for _ in range(max(1, round(self.per_cpu * (os.cpu_count() or 1)))):
            self._hogs.append(subprocess.Popen([sys.executable, "-S", "-c", _SPIN], stdin=subprocess.DEVNULL))

    def heal(self, target: Target) -> None:
        while self._hogs:
            hog = self._hogs.pop()
            hog.kill()
            hog.wait()


def make_cpu_hog(parameters: Mapping[str, Any]) -> CpuHog:
    """`per_cpu` 0.1 to 16."""
    taken = Parameters(parameters)
    made = CpuHog(taken.number("per_cpu", 1.0, 0.1, 16))
    taken.done()
    return made
