"""Network cut: of one node, of a pair, one-way, or in halves.

With network namespaces: iptables drops packets in the victim's. Else by the proxy, which holds what is sent: to both
ends a cut looks the same, since TCP sends again what was dropped. HTTP clients of a router that is cut still reach it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chaos.faults.cuts import CUTS, AddressRefusal, flows, make_cut, with_addresses
from chaos.faults.parameters import Parameters
from chaos.proxy.link_rules import LinkRule
from chaos.proxy.proxy import link_proxy
from chaos.target import Node, Target, TargetError
from chaos.targets.host_commands import NetworkNamespace, missing
from chaos.undo import UndoList


class Cut:
    """`kind`: see `cuts.make_cut`. Healed by taking out just the rules that were put in."""

    name = "cut"
    needs: frozenset[str] = frozenset()

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._undo = UndoList()

    def unavailable(self, target: Target) -> str:
        if "netns" in target.features:
            return missing("nsenter", "iptables", "ip")
        return "" if "proxy" in target.features else "a cut needs network namespaces or links through a proxy"

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        nodes = target.nodes()
        try:
            refusals = make_cut(self.kind, [victim.name for victim in victims], [node.name for node in nodes])
        except ValueError as error:
            raise TargetError(str(error)) from None
        if "netns" not in target.features:
            proxy = link_proxy(target)
            rules = [LinkRule(source, destination, is_stalled=True) for source, destination in sorted(flows(refusals))]
            self._undo.add(proxy.remove, rules)
            return proxy.add(rules)
        namespaces = {node.name: NetworkNamespace(node.pid) for node in nodes}
        addresses = {name: namespace.addresses() for name, namespace in namespaces.items()}
        for refusal in with_addresses(refusals, addresses):
            self._refuse(namespaces[refusal.node], refusal)

    def heal(self, target: Target) -> None:
        self._undo.run()

    def _refuse(self, namespace: NetworkNamespace, refusal: AddressRefusal) -> None:
        chain, flag = ("INPUT", "-s") if refusal.direction == "in" else ("OUTPUT", "-d")
        for address in refusal.peer_addresses:
            add_packet_rule(namespace, self._undo, chain, flag, address, "-j", "DROP")


def add_packet_rule(namespace: NetworkNamespace, undo: UndoList, chain: str, *rule: str) -> None:
    """Put a rule first in a chain of the node's namespace; undoing takes it out, if the namespace is still there."""
    namespace.run("iptables", "-w", "-I", chain, "1", *rule)
    undo.add(namespace.run_if_there, "iptables", "-w", "-D", chain, *rule)


def make_cut_fault(parameters: Mapping[str, Any]) -> Cut:
    """`kind`: off, pair, one_way, one_way_back, halves."""
    given = Parameters(parameters)
    fault = Cut(given.one_of("kind", "off", CUTS))
    given.done()
    return fault
