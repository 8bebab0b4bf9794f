"""Packets are lost: a share of those that come to a node and leave it are dropped, at random, by iptables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from chaos.faults.base import Fault, Range
from chaos.faults.network import NetworkNamespace, add_packet_rule
from chaos.target import Node, Target


class Loss(Fault):
    """Of all packets `percent` are lost. The kernel draws which: that part of a run does not repeat with its seed."""

    name = "loss"
    needs = frozenset({"netns"})
    programs = ("nsenter", "iptables")
    percent: Annotated[float, Range(0.01, 100)] = 5

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        share = ["-m", "statistic", "--mode", "random", "--probability", f"{self.percent / 100:.6f}", "-j", "DROP"]
        for victim in victims:
            namespace = NetworkNamespace(victim.pid)
            add_packet_rule(namespace, self._undo, "INPUT", "!", "-i", "lo", *share)
            add_packet_rule(namespace, self._undo, "OUTPUT", "!", "-o", "lo", *share)
