"""A line on which nothing arrives while connections stay open; what was sent arrives, late, when it is healed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.proxy.link_rules import LinkRule
from chaos.proxy.proxy import link_proxy
from chaos.target import Node, Target
from chaos.undo import UndoList

DIRECTIONS = ("both", "from", "to")


class Stall:
    """What comes from each victim, what goes to it, or both."""

    name = "stall"
    needs = frozenset({"proxy"})

    def __init__(self, direction: str) -> None:
        self.direction = direction
        self._undo = UndoList()

    def unavailable(self, target: Target) -> str:
        return ""

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        proxy = link_proxy(target)
        rules = []
        for victim in victims:
            if self.direction != "to":
                rules.append(LinkRule(source=victim.name, is_stalled=True))
            if self.direction != "from":
                rules.append(LinkRule(destination=victim.name, is_stalled=True))
        self._undo.add(proxy.remove, rules)
        proxy.add(rules)

    def heal(self, target: Target) -> None:
        self._undo.run()


def make_stall(parameters: Mapping[str, Any]) -> Stall:
    """`direction`: both, from (what the victim sends), to (what it is sent)."""
    given = Parameters(parameters)
    fault = Stall(given.one_of("direction", "both", DIRECTIONS))
    given.done()
    return fault
