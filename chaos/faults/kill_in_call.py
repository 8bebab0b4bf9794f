"""A node is killed while a call of its rings is half done: while an answer is computed and written, or lies unread."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from types import MappingProxyType
from typing import Annotated, Literal

from chaos.faults.background import BackgroundFault
from chaos.faults.base import Range
from chaos.faults.rings import Ring, SlotState, rings_of, stopped_process
from chaos.target import Node, Target, TargetError

LOOK_S = 0.02
"""How long a stopped victim is looked at for what others do meanwhile."""
OTHERS_MAKE_IT = MappingProxyType({"asked": "expert", "answered": "stage"})
"""States that a slot comes to while a victim of this kind stands still. For another it is looked at once: one that
stands still for longer is late, and then it is asked in messages for a while."""
STEP_S = 0.002
PAUSE_S = 0.011
"""How long it runs between two looks."""


class KillInCall(BackgroundFault):
    """Each victim is stopped for a moment, again and again, until a slot of its rings is in this state: the call is
    `asked` and not begun, `taken` by the expert node, or `answered` and not read. Then it is killed; if there is no
    such call `within_s`, it is killed all the same, and the report says so."""

    name = "kill_in_call"
    state: Literal["taken", "asked", "answered"] = "taken"
    within_s: Annotated[float, Range(0, 60)] = 5

    def can_hurt(self, node: Node) -> bool:
        return bool(rings_of(node))

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            rings = rings_of(victim)
            if not rings:
                raise TargetError(f"{victim.name}: no ring is mapped there")
            try:
                rings[0].states()
            except OSError as error:
                raise TargetError(f"the rings of {victim.name} cannot be read: {error.strerror}") from None
        self._begin(lambda: self._kill_all(target, victims), patience_s=self.within_s + 1)

    def _kill_all(self, target: Target, victims: Sequence[Node]) -> None:
        until_s = time.monotonic() + self.within_s
        remarks, doubts = zip(*(self._kill(target, victim, until_s) for victim in victims), strict=True)
        self.remark = "; ".join(filter(None, remarks))
        self.doubt = "; ".join(filter(None, doubts))

    def _kill(self, target: Target, victim: Node, until_s: float) -> tuple[str, str]:
        """Returns how it was killed, or why it was not."""
        try:
            while not self._kill_if_in_call(target, victim):
                if self._stopped.wait(PAUSE_S):
                    return "", f"{victim.name} was not killed before all was healed"
                if time.monotonic() >= until_s:
                    target.signal(victim, signal.SIGKILL)
                    return f"{victim.name} was killed without a call that was {self.state} in {self.within_s:g} s", ""
        except ProcessLookupError:
            return "", f"{victim.name} was gone before a call was found"
        return f"{victim.name} was killed in a call", ""

    def _kill_if_in_call(self, target: Target, victim: Node) -> bool:
        """Returns whether it was. Raises ProcessLookupError."""
        rings = rings_of(victim)
        with contextlib.ExitStack() as stopped:
            for pid in {ring.pid for ring in rings}:
                stopped.enter_context(stopped_process(pid))
            until_s = time.monotonic() + (LOOK_S if OTHERS_MAKE_IT.get(self.state) == victim.kind else 0.0)
            while not any(self._is_in_call(ring) for ring in rings):
                if time.monotonic() >= until_s or self._stopped.wait(STEP_S):
                    return False
            target.signal(victim, signal.SIGKILL)
            return True

    def _is_in_call(self, ring: Ring) -> bool:
        try:
            return SlotState[self.state.upper()] in ring.states()
        except OSError:
            return False  # it was given up meanwhile
