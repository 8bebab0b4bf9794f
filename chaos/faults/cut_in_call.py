"""A link between native code breaks while a call is under way on it, in the middle of a frame; nothing else is hurt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated

from chaos.faults.base import Fault, Range
from chaos.proxy.call_frames import CallFrame, call_frame
from chaos.proxy.link_proxy import link_proxy
from chaos.proxy.zmtp_frames import Message
from chaos.target import Node, Target


class CutInCall(Fault):
    """The connection over which a victim asks or answers a call between native code ends after half of that frame, one
    such connection every `every_s`. Until it is healed."""

    name = "cut_in_call"
    needs = frozenset({"proxy"})
    frame: CallFrame = "answer"
    every_s: Annotated[float, Range(0, 10)] = 0.3
    _num_cut: int = field(default=0, init=False, repr=False)
    _not_before_s: float = field(default=0.0, init=False, repr=False)

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        proxy, names = link_proxy(target), {victim.name for victim in victims}

        def cut(source: str, destination: str, message: Message) -> bool:
            return not names.isdisjoint((source, destination)) and self._cuts(message, time.monotonic())

        self.doubt = "no call went over a link meanwhile"
        self._undo.add(proxy.remove_cut, cut)
        proxy.add_cut(cut)

    def _cuts(self, message: Message, now_s: float) -> bool:
        if now_s < self._not_before_s or call_frame(message) != self.frame:
            return False
        self._not_before_s = now_s + self.every_s
        self._num_cut += 1
        self.remark, self.doubt = f"links cut in a call: {self._num_cut}", ""
        return True
