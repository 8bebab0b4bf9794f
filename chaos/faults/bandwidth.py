"""The line of a node is slow. With network namespaces a token bucket (`tc tbf`) slows what the node sends; else the
proxy slows what it sends and what it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from chaos.faults.base import Range
from chaos.faults.network import NetworkFault, NetworkNamespace, replace_discipline
from chaos.proxy.link_rules import LinkRule, around
from chaos.target import Node, Target

QUEUE_MS = 400
BURST_BYTES = 16_384


class Bandwidth(NetworkFault):
    """Each victim has a line of its own with `kbit_per_s`, of 1,000 bits."""

    name = "bandwidth"
    programs = ("nsenter", "tc", "ip")
    kbit_per_s: Annotated[float, Range(8, 1e8)] = 1000

    def rules(self, target: Target, victims: Sequence[Node]) -> list[LinkRule]:
        slow = LinkRule(bytes_per_s=self.kbit_per_s * 125)
        return [rule for victim in victims for rule in around(victim.name, slow)]

    def apply_in_namespaces(self, target: Target, victims: Sequence[Node]) -> None:
        limits = ["rate", f"{self.kbit_per_s:.0f}kbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms"]
        for victim in victims:
            replace_discipline(NetworkNamespace(victim.pid), self._undo, "tbf", *limits)
