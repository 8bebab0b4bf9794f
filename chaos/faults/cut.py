"""The network is cut: around one node, between a pair, one-way, or in halves.

With network namespaces iptables drops packets in the victim's. Else the proxy holds what is sent: to both ends a cut
looks the same, since TCP sends again what was dropped. HTTP clients of a router that is cut still reach it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from chaos.faults.network import NetworkFault, NetworkNamespace, add_packet_rule
from chaos.proxy.link_rules import LinkRule
from chaos.target import Node, Target, TargetError

Direction = Literal["in", "out"]
CutKind = Literal["off", "pair", "one_way", "one_way_back", "halves"]


class Cut(NetworkFault):
    """`kind` says which nodes do not reach which; see `make_cut`."""

    name = "cut"
    programs = ("nsenter", "iptables", "ip")
    kind: CutKind = "off"

    def rules(self, target: Target, victims: Sequence[Node]) -> list[LinkRule]:
        pairs = sorted(flows(self._refusals(victims, target.nodes())))
        return [LinkRule(source, destination, is_stalled=True) for source, destination in pairs]

    def apply_in_namespaces(self, target: Target, victims: Sequence[Node]) -> None:
        nodes = target.nodes()
        namespaces = {node.name: NetworkNamespace(node.pid) for node in nodes}
        addresses = {name: namespace.addresses() for name, namespace in namespaces.items()}
        for refusal in self._refusals(victims, nodes):
            chain, flag = ("INPUT", "-s") if refusal.direction == "in" else ("OUTPUT", "-d")
            if refusal.node not in namespaces:
                raise TargetError(f"{refusal.node} is gone: nothing can be cut there")
            for address in addresses.get(refusal.peer, ()):  # one that is gone is cut off as it is
                add_packet_rule(namespaces[refusal.node], self._undo, chain, flag, address, "-j", "DROP")

    def _refusals(self, victims: Sequence[Node], nodes: Sequence[Node]) -> list[Refusal]:
        try:
            return make_cut(self.kind, [victim.name for victim in victims], [node.name for node in nodes])
        except ValueError as error:
            raise TargetError(str(error)) from None


@dataclass(frozen=True, slots=True, order=True)
class Refusal:
    """`node` drops what comes in from `peer`, or what goes out to it."""

    node: str
    peer: str
    direction: Direction


def make_cut(kind: str, victims: Sequence[str], everybody: Sequence[str]) -> list[Refusal]:
    """Returns the cut that a suite names, for its victims. Raises ValueError.

    `off` is for each of them; `halves` cuts them from the rest. `pair`, `one_way` (the first speaks, the second does
    not hear) and `one_way_back` (the other way round) need two. It is done at the victims themselves: healing them
    heals all.
    """
    if kind == "off":
        pairs = [(victim, peer) for victim in victims for peer in everybody if peer != victim]
        return sorted({refusal for pair in pairs for refusal in _both_ways(*pair)})
    if kind == "halves":
        others = [name for name in everybody if name not in victims]
        if not victims or not others:
            raise ValueError("both halves need a node")
        return [refusal for victim in victims for peer in others for refusal in _both_ways(victim, peer)]
    if kind not in get_args(CutKind):
        raise ValueError(f"cut {kind!r}: one of {', '.join(get_args(CutKind))} is known")
    if len(victims) != 2:
        raise ValueError(f"cut {kind} is between 2 nodes, not {len(victims)}")
    first, second = victims
    if first == second:
        raise ValueError(f"{first} cannot be cut from itself")
    if kind == "pair":
        return _both_ways(first, second)
    return [Refusal(second, first, "in") if kind == "one_way" else Refusal(first, second, "in")]


def _both_ways(node: str, peer: str) -> list[Refusal]:
    return [Refusal(node, peer, "in"), Refusal(node, peer, "out")]


def flows(refusals: Iterable[Refusal]) -> set[tuple[str, str]]:
    """Returns the (from, to) pairs whose bytes do not arrive."""
    return {(r.peer, r.node) if r.direction == "in" else (r.node, r.peer) for r in refusals}
