"""A node is killed by SIGKILL and has no time for anything. What runs the mesh restarts it, or does not."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from chaos.faults.base import Fault
from chaos.target import Node, Target


class Kill(Fault):
    """All victims are killed in the same instant. There is nothing to heal: the restart is the mesh's own business."""

    name = "kill"

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            target.signal(victim, signal.SIGKILL)
