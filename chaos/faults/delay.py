"""Latency on what a node sends and what it is sent: netem where the kernel has it (then on what it sends, twice as
much: the same for a question and its answer), else the proxy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.proxy.link_rules import around
from chaos.proxy.proxy import link_proxy
from chaos.target import Node, Target
from chaos.targets.host_commands import NetworkNamespace, missing
from chaos.targets.queue_discipline import has_netem, replace_discipline
from chaos.undo import UndoList


class Delay:
    """`delay_ms` each way, for each victim."""

    name = "delay"
    needs: frozenset[str] = frozenset()

    def __init__(self, delay_ms: float) -> None:
        self.delay_ms = delay_ms
        self._undo = UndoList()

    def unavailable(self, target: Target) -> str:
        if "proxy" in target.features:
            return ""
        if "netns" not in target.features:
            return "a delay needs links through a proxy, or network namespaces and netem"
        return missing("nsenter", "tc", "ip", "unshare") or ("" if has_netem() else "this kernel has no netem")

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            if "proxy" in target.features:
                proxy, rules = link_proxy(target), around(victim.name, delay_ms=self.delay_ms)
                self._undo.add(proxy.remove, rules)
                proxy.add(rules)
            else:
                replace_discipline(
                    NetworkNamespace(victim.pid), self._undo, "netem", "delay", f"{2 * self.delay_ms:.1f}ms"
                )

    def heal(self, target: Target) -> None:
        self._undo.run()


def make_delay(parameters: Mapping[str, Any]) -> Delay:
    """`delay_ms` each way."""
    given = Parameters(parameters)
    fault = Delay(given.number("delay_ms", 50.0, 0.1, 60_000.0))
    given.done()
    return fault
