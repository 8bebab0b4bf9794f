"""Who refuses whom: a network cut as plain data, made here and applied by others. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Direction = Literal["in", "out"]
CutKind = Literal["off", "pair", "one_way", "one_way_back", "halves"]


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
    """One node cut off from all others of the mesh, in both directions; done at the node itself."""
    return [refusal for peer in sorted(set(everybody) - {node}) for refusal in pair(node, peer)]


def pair(node: str, peer: str) -> list[Refusal]:
    """Two nodes that do not reach each other but everybody else."""
    _check_differ(node, peer)
    return [Refusal(node, peer, "in"), Refusal(node, peer, "out")]


def one_way(speaker: str, listener: str) -> list[Refusal]:
    """The listener does not hear the speaker, who hears the listener."""
    _check_differ(speaker, listener)
    return [Refusal(listener, speaker, "in")]


def halves(ones: Sequence[str], others: Sequence[str]) -> list[Refusal]:
    """Two groups that do not reach each other. Raises ValueError if one is empty or a node is in both."""
    if not ones or not others:
        raise ValueError("both halves need a node")
    return [refusal for node in ones for peer in others for refusal in pair(node, peer)]


def make_cut(kind: str, victims: Sequence[str], everybody: Sequence[str]) -> list[Refusal]:
    """The cut that a suite names, for its victims. Raises ValueError.

    `off` is for each of them; `halves` cuts them from the rest. `pair`, `one_way` (the first speaks, the second does
    not hear) and `one_way_back` (the other way round) need two.
    """
    if kind == "off":
        return sorted({refusal for victim in victims for refusal in off(victim, everybody)})
    if kind == "halves":
        return halves(victims, [name for name in everybody if name not in victims])
    if kind in ("pair", "one_way", "one_way_back"):
        if len(victims) != 2:
            raise ValueError(f"cut {kind} is between 2 nodes, not {len(victims)}")
        first, second = victims
        if kind == "pair":
            return pair(first, second)
        return one_way(first, second) if kind == "one_way" else one_way(second, first)
    raise ValueError(f"cut {kind!r}: one of {', '.join(get_args(CutKind))} is known")


def with_addresses(refusals: Iterable[Refusal], addresses: dict[str, tuple[str, ...]]) -> list[AddressRefusal]:
    """One entry for each node and direction, its peers' addresses together; peers without an address are left out."""
    found: dict[tuple[str, Direction], set[str]] = {}
    for refusal in refusals:
        found.setdefault((refusal.node, refusal.direction), set()).update(addresses.get(refusal.peer, ()))
    return sorted(
        AddressRefusal(node, tuple(sorted(peers)), direction) for (node, direction), peers in found.items() if peers
    )


def flows(refusals: Iterable[Refusal]) -> set[tuple[str, str]]:
    """The (from, to) pairs whose bytes do not arrive."""
    return {(r.peer, r.node) if r.direction == "in" else (r.node, r.peer) for r in refusals}


def _check_differ(node: str, peer: str) -> None:
    if node == peer:
        raise ValueError(f"{node} cannot be cut from itself")
