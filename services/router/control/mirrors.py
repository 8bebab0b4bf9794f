"""Which spare mirrors which slot. Pure: plain values in, decisions out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from common.ids import LeaseTerm, NodeId
from common.topology import StageSlot


class MirrorState(StrEnum):
    """How far a mirror is."""

    LOADING = "loading"
    FILLING = "filling"
    COMPLETE = "complete"


@dataclass(slots=True)
class MirrorPair:
    """A slot's mirror."""

    node_id: NodeId
    primary: NodeId
    lease_term: LeaseTerm
    num_blocks: int
    state: MirrorState = MirrorState.LOADING


@dataclass(frozen=True, slots=True)
class MirroredSlot:
    """A slot as it is held now."""

    slot: StageSlot
    holder: NodeId
    numeric_class: str
    lease_term: LeaseTerm
    num_blocks: int
    is_wanted: bool
    """Whether a mirror is to be found for it if it has none."""


def valid_pairs(
    pairs: Mapping[StageSlot, MirrorPair], slots: Sequence[MirroredSlot], spares: Sequence[NodeId]
) -> dict[StageSlot, MirrorPair]:
    """Pairs whose mirror is still a spare and whose slot is held as it was when they were made."""
    now = {wanted.slot: wanted for wanted in slots}
    return {
        slot: pair
        for slot, pair in pairs.items()
        if pair.node_id in spares
        and slot in now
        and (pair.primary, pair.lease_term, pair.num_blocks)
        == (now[slot].holder, now[slot].lease_term, now[slot].num_blocks)
    }


def choose_mirrors(
    slots: Sequence[MirroredSlot],
    pairs: Mapping[StageSlot, MirrorPair],
    spares: Sequence[tuple[NodeId, str]],
    fits: Callable[[NodeId, MirroredSlot], bool],
) -> dict[StageSlot, NodeId]:
    """New mirrors: each slot without one, in order, gets the first idle spare of its numeric class that it fits.

    `spares`: node and numeric class, by join order. A mirror of another class would change bits after a takeover.
    """
    idle = [(node_id, of) for node_id, of in spares if node_id not in {pair.node_id for pair in pairs.values()}]
    chosen: dict[StageSlot, NodeId] = {}
    for wanted in slots:
        if wanted.slot in pairs or not wanted.is_wanted:
            continue
        found = next((e for e in idle if e[1] == wanted.numeric_class and fits(e[0], wanted)), None)
        if found is not None:
            idle.remove(found)
            chosen[wanted.slot] = found[0]
    return chosen
