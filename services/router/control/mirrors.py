"""Which spare mirrors which slot. Pure: plain values in, decisions out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from common.ids import LeaseTerm, NodeId
from common.topology import StageSlot
from services.router.control.matching import fill


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
    shares_host: bool
    """Whether one host that is lost takes the slot's holder and its mirror."""
    number: int = 0
    """Of the role that the mirror was told."""
    state: MirrorState = MirrorState.LOADING
    feed_number: int = 0
    """Of the message that tells the holder to send to it; 0: it has not loaded yet."""
    broken_stream: int = 0
    """The last stream of rows of which the mirror said that it broke."""


@dataclass(frozen=True, slots=True)
class MirroredSlot:
    """A slot as it is held now."""

    slot: StageSlot
    holder: NodeId
    numeric_class: str
    host_label: str
    lease_term: LeaseTerm
    num_blocks: int
    is_wanted: bool
    """Whether a mirror is to be found for it if it has none."""
    is_leaving: bool = False
    """Whether its holder waits for the mirror in order to go."""


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


@dataclass(frozen=True, slots=True)
class Spare:
    """A stage node without a slot."""

    node_id: NodeId
    numeric_class: str
    host_label: str


def choose_mirrors(
    slots: Sequence[MirroredSlot],
    pairs: Mapping[StageSlot, MirrorPair],
    successors: Mapping[StageSlot, MirrorPair],
    spares: Sequence[Spare],
    fits: Callable[[NodeId, MirroredSlot], bool],
) -> dict[StageSlot, NodeId]:
    """New mirrors, by slot, of spares that mirror nobody yet. `spares` in the order in which they are to be taken.

    A mirror is of its slot's numeric class: another one would change bits after a takeover. Slots whose holder leaves
    come first. Then as many as can be get a mirror on another host than their holder's, and what spares are left go to
    slots that have none. A slot whose mirror shares its holder's host gets another one where a spare elsewhere is idle;
    `successors` are those that were found before and are not ready yet.
    """
    taken = {pair.node_id for pair in (*pairs.values(), *successors.values())}
    idle = [spare for spare in spares if spare.node_id not in taken]
    wanted = [slot for slot in slots if slot.is_wanted]
    alone = [slot for slot in wanted if slot.slot not in pairs]
    leaving = [slot for slot in alone if slot.is_leaving]
    on_one_host = [s for s in wanted if s.slot in pairs and pairs[s.slot].shares_host and s.slot not in successors]
    chosen: dict[StageSlot, NodeId] = {}
    # A successor before a mirror on one host: the spare that it sets free may be elsewhere for the slot that has none.
    for of, on_other_host in ((leaving, True), (leaving, False), (alone, True), (on_one_host, True), (alone, False)):
        found = _match([slot for slot in of if slot.slot not in chosen], idle, fits, on_other_host=on_other_host)
        chosen |= found
        idle = [spare for spare in idle if spare.node_id not in found.values()]
    return chosen


def _match(
    slots: Sequence[MirroredSlot],
    idle: Sequence[Spare],
    fits: Callable[[NodeId, MirroredSlot], bool],
    *,
    on_other_host: bool,
) -> dict[StageSlot, NodeId]:
    """As many pairs as can be, the first slots and the first spares before others."""
    able = [
        [
            spare.numeric_class == slot.numeric_class
            and not (on_other_host and spare.host_label == slot.host_label)
            and fits(spare.node_id, slot)
            for spare in idle
        ]
        for slot in slots
    ]
    held = [[0] * len(idle) for _ in slots]
    limits = [[int(is_able) for is_able in row] for row in able]
    fill(held, [1] * len(slots), [1] * len(idle), limits, lambda _, number: number)
    return {
        slot.slot: idle[number].node_id
        for slot, row in zip(slots, held, strict=True)
        for number, count in enumerate(row)
        if count
    }
