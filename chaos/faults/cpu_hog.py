"""Processes of our own take CPU time: the mesh is slow and healthy, and no node may be declared dead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated

from chaos.faults.base import Fault, Range
from chaos.target import Node, Target

# It ends by itself when its parent has gone: a harness that is killed leaves no load behind.
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))\n"


class CpuHog(Fault):
    """For each CPU of this machine `per_cpu` busy processes run: 1.0 beside a busy mesh is twice what there is."""

    name = "cpu_hog"
    per_cpu: Annotated[float, Range(0.1, 16)] = 1

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for _ in range(max(1, round(self.per_cpu * (os.cpu_count() or 1)))):
            hog = subprocess.Popen([sys.executable, "-S", "-c", _SPIN], stdin=subprocess.DEVNULL)
            self._undo.add(_end, hog)


def _end(hog: subprocess.Popen[bytes]) -> None:
    hog.kill()
    hog.wait()
