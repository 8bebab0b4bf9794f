"""A node is killed while a call of its rings is half done: while an answer is computed and written, or lies unread."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from typing import Annotated, Literal

from chaos.faults.background import BackgroundFault
from chaos.faults.base import Range
from chaos.faults.rings import SlotState, processes_of, rings_of, stopped_process
from chaos.target import Node, Target, TargetError

LOOK_S = 0.02
"""How long a stopped victim is looked at: meanwhile the others ask it, or answer what it has asked."""
STEP_S = 0.002
PAUSE_S = 0.011
"""How long it runs between two looks."""


class KillInCall(BackgroundFault):
    """Each victim is stopped for a moment, again and again, until a slot of its rings is in this state: the call is
    `asked` and not begun, `taken` by the expert node, or `answered` and not read. Then it is killed; if there is no
    such call `within_s`, it is killed all the same."""

    name = "kill_in_call"
    state: Literal["taken", "asked", "answered"] = "taken"
    within_s: Annotated[float, Range(0, 60)] = 5

    def can_hurt(self, node: Node) -> bool:
        return bool(rings_of(node))

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        if not processes_of(victims):
            raise TargetError(f"{', '.join(victim.name for victim in victims)}: no ring is mapped there")
        self._begin(lambda: self._kill_all(target, victims), patience_s=self.within_s + 1)

    def _kill_all(self, target: Target, victims: Sequence[Node]) -> None:
        until_s = time.monotonic() + self.within_s
        for victim in victims:
            while not self._kill_if_in_call(target, victim):
                if self._stopped.wait(PAUSE_S):
                    return
                if time.monotonic() >= until_s:
                    target.signal(victim, signal.SIGKILL)
                    break

    def _kill_if_in_call(self, target: Target, victim: Node) -> bool:
        """Returns whether there is nothing left to kill."""
        rings = rings_of(victim)
        with contextlib.ExitStack() as stopped:
            try:
                for pid in {ring.pid for ring in rings}:
                    stopped.enter_context(stopped_process(pid))
            except ProcessLookupError:
                return True
            until_s = time.monotonic() + LOOK_S
            while time.monotonic() < until_s and not self._stopped.is_set():
                if SlotState[self.state.upper()] in (state for ring in rings for state in ring.states()):
                    target.signal(victim, signal.SIGKILL)
                    return True
                self._stopped.wait(STEP_S)
        return False
