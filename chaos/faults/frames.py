"""Messages to and from a node are corrupted, cut short, replayed, reordered or lost on the wire, by the proxy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from chaos.faults.base import Range
from chaos.faults.network import ProxyFault
from chaos.proxy.link_rules import LinkRule, around
from chaos.proxy.zmtp_frames import Damage, FrameRule
from chaos.target import Node, Target


class Frames(ProxyFault):
    """Each message is damaged with a probability of `percent`, drawn from `seed` for each direction of a link."""

    name = "frames"
    kind: Damage = "corrupt"
    percent: Annotated[float, Range(0.01, 100)] = 5
    seed: Annotated[int, Range(0, 2**31)] = 0

    def rules(self, target: Target, victims: Sequence[Node]) -> list[LinkRule]:
        damaged = LinkRule(frames=(FrameRule(self.kind, self.percent / 100, self.seed),))
        return [rule for victim in victims for rule in around(victim.name, damaged)]
