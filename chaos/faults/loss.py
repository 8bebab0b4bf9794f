"""Packet loss: a share of the packets that come to a node and leave it are dropped, at random, by iptables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chaos.faults.cut import add_packet_rule
from chaos.faults.parameters import Parameters
from chaos.target import Node, Target
from chaos.targets.host_commands import NetworkNamespace, missing
from chaos.undo import UndoList


class Loss:
    """Which packets are hit is the kernel's draw: this part of a run is not repeatable from its seed."""

    name = "loss"
    needs = frozenset({"netns"})

    def __init__(self, percent: float) -> None:
        self.percent = percent
        self._undo = UndoList()

    def unavailable(self, target: Target) -> str:
        return missing("nsenter", "iptables")

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        share = ["-m", "statistic", "--mode", "random", "--probability", f"{self.percent / 100:.6f}", "-j", "DROP"]
        for victim in victims:
            namespace = NetworkNamespace(victim.pid)
            add_packet_rule(namespace, self._undo, "INPUT", "!", "-i", "lo", *share)
            add_packet_rule(namespace, self._undo, "OUTPUT", "!", "-o", "lo", *share)

    def heal(self, target: Target) -> None:
        self._undo.run()


def make_loss(parameters: Mapping[str, Any]) -> Loss:
    """`percent` of packets."""
    given = Parameters(parameters)
    fault = Loss(given.number("percent", 5.0, 0.01, 100.0))
    given.done()
    return fault
