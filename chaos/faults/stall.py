"""Nothing arrives on a line while its connections stay open; what was sent arrives, late, when it is healed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from chaos.faults.network import ProxyFault
from chaos.proxy.link_rules import LinkRule
from chaos.target import Node, Target


class Stall(ProxyFault):
    """What comes `from` each victim is held, or what goes `to` it, or `both`."""

    name = "stall"
    direction: Literal["both", "from", "to"] = "both"

    def rules(self, target: Target, victims: Sequence[Node]) -> list[LinkRule]:
        rules = []
        for victim in victims:
            if self.direction != "to":
                rules.append(LinkRule(source=victim.name, is_stalled=True))
            if self.direction != "from":
                rules.append(LinkRule(destination=victim.name, is_stalled=True))
        return rules
