"""Messages to and from a node are corrupted, cut short, replayed, reordered or lost on the wire, by the proxy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.proxy.link_rules import FrameRule, around
from chaos.proxy.proxy import link_proxy
from chaos.proxy.zmtp_frames import DAMAGES
from chaos.target import Node, Target
from chaos.undo import UndoList


class Frames:
    """Each message with a probability, as a seeded generator says for each direction of a link."""

    name = "frames"
    needs = frozenset({"proxy"})

    def __init__(self, kind: str, percent: float, seed: int) -> None:
        self.rule = FrameRule(kind, percent / 100, seed)
        self._undo = UndoList()

    def unavailable(self, target: Target) -> str:
        return ""

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        proxy = link_proxy(target)
        rules = [rule for victim in victims for rule in around(victim.name, frames=self.rule)]
        self._undo.add(proxy.remove, rules)
        proxy.add(rules)

    def heal(self, target: Target) -> None:
        self._undo.run()


def make_frames(parameters: Mapping[str, Any]) -> Frames:
    """`kind`: corrupt, truncate, replay, reorder, lose; `percent` of messages; `seed`."""
    given = Parameters(parameters)
    kind = given.one_of("kind", "corrupt", DAMAGES)
    fault = Frames(kind, given.number("percent", 5.0, 0.01, 100.0), given.whole("seed", 0, 0, 2**31))
    given.done()
    return fault
