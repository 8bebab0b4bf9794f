"""What a restarted router takes over: slots as their holders report them, and the cache that they still have. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from common.array import frame_to_array
from common.errors import ProtocolError
from common.messages import Hello
from common.topology import LayerRange

MAX_PIPELINES = 1 << 16


@dataclass(frozen=True, slots=True)
class HeldSequence:
    """One sequence as stages hold it."""

    block_ids: tuple[int, ...]
    num_computed: int
    """Positions whose K and V are there."""


@dataclass(frozen=True, slots=True)
class HeldSlot:
    """What one stage holds from a router before this one."""

    pipeline: int
    slot: int
    num_slots: int
    layers: LayerRange
    lease_term: int
    num_blocks: int
    last_step: int
    sequences: Mapping[int, HeldSequence] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HeldCache:
    """What all stages of a pipeline hold together."""

    sequences: Mapping[int, HeldSequence]
    released: tuple[int, ...]
    """Sequences that some stage has and not all agree on: of no use, to be dropped."""
    mark: int
    """Steps up to this one are in it."""


def read_held_slot(hello: Hello) -> HeldSlot | None:
    """What a stage says of itself; None if it holds nothing. Raises ProtocolError that names the field."""
    if not hello.held_slot:
        return None
    if len(hello.held_slot) != 8:
        raise ProtocolError(f"Hello.held_slot has {len(hello.held_slot)} numbers, 8 are needed")
    pipeline, slot, num_slots, first, stop, lease_term, num_blocks, last_step = hello.held_slot
    if pipeline >= MAX_PIPELINES or not slot < num_slots or not first < stop or num_blocks < 1:
        raise ProtocolError(f"Hello.held_slot {hello.held_slot} is no slot")
    rows = frame_to_array(hello.held_sequences, "int64", (None, 3), "Hello.held_sequences")
    blocks = frame_to_array(hello.held_blocks, "int32", (None,), "Hello.held_blocks")
    if rows.size and (rows.min() < 0 or int(rows[:, 2].sum()) != blocks.size):
        raise ProtocolError(f"Hello.held_blocks has {blocks.size} blocks, its sequences announce {rows[:, 2].sum()}")
    if blocks.size and not 0 <= blocks.min() <= blocks.max() < num_blocks:
        raise ProtocolError(f"Hello.held_blocks names a block outside [0, {num_blocks})")
    ids, taken = blocks.tolist(), 0
    sequences: dict[int, HeldSequence] = {}
    for sequence_id, num_computed, count in rows.tolist():
        sequences[sequence_id] = HeldSequence(tuple(ids[taken : taken + count]), num_computed)
        taken += count
    return HeldSlot(pipeline, slot, num_slots, LayerRange(first, stop), lease_term, num_blocks, last_step, sequences)


def combine(slots: Iterable[HeldSlot], block_tokens: int) -> HeldCache:
    """What can be gone on with: sequences that every reporting slot has, as far as all have computed them.

    Tables may differ in length, since a step reaches one stage before the next; where they differ in content, or two
    sequences name one block, nothing of them is of use.
    """
    reports = list(slots)
    known = [report.sequences for report in reports]
    everything = sorted(set().union(*known)) if known else []
    kept: dict[int, HeldSequence] = {}
    taken: set[int] = set()
    for sequence_id in everything:
        held = [sequences[sequence_id] for sequences in known if sequence_id in sequences]
        longest = max((entry.block_ids for entry in held), key=len)
        num_computed = min(entry.num_computed for entry in held)
        agree = all(longest[: len(entry.block_ids)] == entry.block_ids for entry in held)
        covered = num_computed <= len(longest) * block_tokens
        if len(held) == len(reports) and agree and covered and taken.isdisjoint(longest) and num_computed:
            kept[sequence_id] = HeldSequence(longest, num_computed)
            taken.update(longest)
    released = tuple(number for number in everything if number not in kept)
    return HeldCache(kept, released, min((report.last_step for report in reports), default=0))
