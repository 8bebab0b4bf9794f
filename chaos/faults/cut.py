"""The network is cut: around one node, between a pair, one-way, or in halves.

With network namespaces iptables drops packets in the victim's. Else the proxy holds what is sent: to both ends a cut
looks the same, since TCP sends again what was dropped. HTTP clients of a router that is cut still reach it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from chaos.faults.network import NetworkFault, add_packet_rule
from chaos.proxy.link_rules import LinkRule
from chaos.target import Node, Target, TargetError
from chaos.targets.host_commands import NetworkNamespace

Direction = Literal["in", "out"]
CutKind = Literal["off", "pair", "one_way", "one_way_back", "halves"]


@dataclass
class Cut(NetworkFault):
    """Who does not reach whom is said by `kind`; see `make_cut`."""

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


@dataclass(frozen=True, slots=True, order=True)
class Refusal:
    """`node` drops what comes in from `peer`, or what goes out to it."""

    node: str
    peer: str
    direction: Direction


@dataclass(frozen=True, slots=True, order=True)
class AddressRefusal:
    """A refusal as a packet filter understands it."""

    node: str
    peer_addresses: tuple[str, ...]
    direction: Direction


def off(node: str, everybody: Iterable[str]) -> list[Refusal]:
    """Cuts one node off from all others of the mesh, in both directions; this is done at the node itself."""
    return [refusal for peer in sorted(set(everybody) - {node}) for refusal in pair(node, peer)]


def pair(node: str, peer: str) -> list[Refusal]:
    """Cuts two nodes off from each other; they reach everybody else."""
    _check_differ(node, peer)
    return [Refusal(node, peer, "in"), Refusal(node, peer, "out")]


def one_way(speaker: str, listener: str) -> list[Refusal]:
    """Keeps the listener from hearing the speaker, who hears the listener."""
    _check_differ(speaker, listener)
    return [Refusal(listener, speaker, "in")]


def halves(ones: Sequence[str], others: Sequence[str]) -> list[Refusal]:
    """Cuts two groups off from each other. Raises ValueError if one is empty or a node is in both."""
    if not ones or not others:
        raise ValueError("both halves need a node")
    return [refusal for node in ones for peer in others for refusal in pair(node, peer)]


def make_cut(kind: str, victims: Sequence[str], everybody: Sequence[str]) -> list[Refusal]:
    """Returns the cut that a suite names, for its victims. Raises ValueError.

    `off` is for each of them; `halves` cuts them from the rest. `pair`, `one_way` (the first speaks, the second does
    not hear) and `one_way_back` (the other way round) need two.
    """
    if kind == "off":
        return sorted({refusal for victim in victims for refusal in off(victim, everybody)})
    if kind == "halves":
        return halves(victims, [name for name in everybody if name not in victims])
    if kind not in get_args(CutKind):
        raise ValueError(f"cut {kind!r}: one of {', '.join(get_args(CutKind))} is known")
    if len(victims) != 2:
        raise ValueError(f"cut {kind} is between 2 nodes, not {len(victims)}")
    first, second = victims
    if kind == "pair":
        return pair(first, second)
    return one_way(first, second) if kind == "one_way" else one_way(second, first)


def with_addresses(refusals: Iterable[Refusal], addresses: dict[str, tuple[str, ...]]) -> list[AddressRefusal]:
    """Puts the addresses of a node's peers together, for each direction; peers without an address are left out."""
    found: dict[tuple[str, Direction], set[str]] = {}
    for refusal in refusals:
        found.setdefault((refusal.node, refusal.direction), set()).update(addresses.get(refusal.peer, ()))
    return sorted(
        AddressRefusal(node, tuple(sorted(peers)), direction) for (node, direction), peers in found.items() if peers
    )


def flows(refusals: Iterable[Refusal]) -> set[tuple[str, str]]:
    """Returns the (from, to) pairs whose bytes do not arrive."""
    return {(r.peer, r.node) if r.direction == "in" else (r.node, r.peer) for r in refusals}


def _check_differ(node: str, peer: str) -> None:
    if node == peer:
        raise ValueError(f"{node} cannot be cut from itself")
