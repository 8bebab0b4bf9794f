"""A slow line. With network namespaces: a token bucket (`tc tbf`) on what the node sends; else by the proxy, which
slows what it sends and what it is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.proxy.link_rules import around
from chaos.proxy.proxy import link_proxy
from chaos.target import Node, Target
from chaos.targets.host_commands import NetworkNamespace, missing
from chaos.targets.queue_discipline import replace_discipline
from chaos.undo import UndoList

QUEUE_MS = 400
BURST_BYTES = 16_384


class Bandwidth:
    """Of each victim."""

    name = "bandwidth"
    needs: frozenset[str] = frozenset()

    def __init__(self, kbit_per_s: float) -> None:
        self.kbit_per_s = kbit_per_s
        self._undo = UndoList()

    def unavailable(self, target: Target) -> str:
        if "netns" in target.features:
            return missing("nsenter", "tc", "ip")
        return "" if "proxy" in target.features else "bandwidth needs network namespaces or links through a proxy"

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            if "netns" in target.features:
                limits = ["rate", f"{self.kbit_per_s:.0f}kbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms"]
                replace_discipline(NetworkNamespace(victim.pid), self._undo, "tbf", *limits)
            else:
                proxy, rules = link_proxy(target), around(victim.name, bytes_per_s=self.kbit_per_s * 125)
                self._undo.add(proxy.remove, rules)
                proxy.add(rules)

    def heal(self, target: Target) -> None:
        self._undo.run()


def make_bandwidth(parameters: Mapping[str, Any]) -> Bandwidth:
    """`kbit_per_s`, of 1,000 bits."""
    given = Parameters(parameters)
    fault = Bandwidth(given.number("kbit_per_s", 1000.0, 8.0, 1e8))
    given.done()
    return fault
