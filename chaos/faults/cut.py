"""The network is cut: around one node, between a pair, one-way, or in halves.

With network namespaces iptables drops packets in the victim's. Else the proxy holds what is sent: to both ends a cut
looks the same, since TCP sends again what was dropped. HTTP clients of a router that is cut still reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chaos.faults.cuts import CutKind, Refusal, flows, make_cut, with_addresses
from chaos.faults.network import NetworkFault, add_packet_rule
from chaos.proxy.link_rules import LinkRule
from chaos.target import Node, Target, TargetError
from chaos.targets.host_commands import NetworkNamespace


@dataclass
class Cut(NetworkFault):
    """Who does not reach whom is said by `kind`; see `cuts.make_cut`."""

    name = "cut"
    programs = ("nsenter", "iptables", "ip")
    kind: CutKind = "off"

    def rules(self, target: Target, victims: Sequence[Node]) -> list[LinkRule]:
        pairs = sorted(flows(self._refusals(victims, target.nodes())))
        return [LinkRule(source, destination, is_stalled=True) for source, destination in pairs]

    def apply_in_namespaces(self, target: Target, victims: Sequence[Node]) -> None:
        nodes = target.nodes()
        refusals = self._refusals(victims, nodes)
        namespaces = {node.name: NetworkNamespace(node.pid) for node in nodes}
        addresses = {name: namespace.addresses() for name, namespace in namespaces.items()}
        for refusal in with_addresses(refusals, addresses):
            chain, flag = ("INPUT", "-s") if refusal.direction == "in" else ("OUTPUT", "-d")
            for address in refusal.peer_addresses:
                add_packet_rule(namespaces[refusal.node], self._undo, chain, flag, address, "-j", "DROP")

    def _refusals(self, victims: Sequence[Node], nodes: Sequence[Node]) -> list[Refusal]:
        try:
            return make_cut(self.kind, [victim.name for victim in victims], [node.name for node in nodes])
        except ValueError as error:
            raise TargetError(str(error)) from None
