"""What a restarted router takes over: slots as their holders report them, and the cache that they still have. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from common.errors import ProtocolError
from common.ids import NodeId, PipelineId, SlotIndex
from common.messages import Hello
from common.topology import LayerRange, SlotReport, StageSlot
from common.wire.array import BoolArray, frame_to_array
from common.wire.records import HELD_SEQUENCE, frame_to_records

MAX_PIPELINES = 1 << 16
ADOPT_S = 1.5
"""How long a restarted router waits for the holders that it does not know yet, from the first node that registers."""
NEW_S = 0.3
"""The same where all that have come are new processes, and enough for a pipeline: everything was started anew, and what
outlives a router is back before processes have started."""
MAX_STEPS_APART = 64
"""Holders of one pipeline differ by what was in flight between them. One further behind may have been replaced, and its
successor may still come."""
OPEN_S = 5.0
"""How much longer requests wait for an adopted pipeline to open, while another one could take them."""


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
    last_steps: Mapping[int, int]
    """Maps each slot whose holder has reported and has it still to its last step then."""

    def is_held_by(self, slot: int, kv_mark: int) -> bool:
        """Returns whether a slot's holder, whose memory is good up to step `kv_mark`, has all of it.

        One that did not report has not, whatever its mark. A mark says nothing of steps that overtook an older one, and
        nothing of blocks that were given to another sequence after the report.
        """
        return slot in self.last_steps and max(self.last_steps[slot], 1) <= kv_mark

    def kept_by(self, slots: Set[int]) -> HeldCache:
        """Returns the same, where only these slots' holders are those that reported."""
        return replace(self, last_steps={slot: step for slot, step in self.last_steps.items() if slot in slots})


@dataclass(frozen=True, slots=True)
class AdoptedPipeline:
    """A pipeline as it was before the router was restarted."""

    pipeline: PipelineId
    holders: tuple[NodeId | None, ...]
    """None: no holder has come back for this slot."""
    lease_terms: tuple[int, ...]
    """0 for a hole."""
    num_blocks: int
    held: HeldCache | None


class Adoption:
    """Collects what nodes claim. A pipeline is taken over once all its holders are back, or when their time is up."""

    def __init__(self, layers: Sequence[LayerRange], block_tokens: int, is_wanted: bool) -> None:
        """`layers`: by slot of this mesh. Not wanted (a first router): there is nothing to wait for."""
        self._layers = layers
        self._block_tokens = block_tokens
        self._claims: dict[StageSlot, tuple[NodeId, HeldSlot]] = {}
        self._deadline_s: float | None = None
        self._adopted: set[PipelineId] = set()
        self._known_sequences: set[int] = set()
        """Those of pipelines that were taken over: what these hold is known, however little it is worth."""
        self._losers: dict[NodeId, int] = {}
        """Nodes that claim what others hold, with the lease terms of their claims."""
        self._new_processes: set[NodeId] = set()
        """Those that live and had never heard a router when they first said hello to this one."""
        self._has_old_process = False
        self.is_pending = is_wanted
        """Whether a holder may still come back for a slot. Until then no other node gets one."""

    def see_process(self, node_id: NodeId, is_new: bool) -> None:
        """A stage node said hello; `is_new`: it has never heard a router. One that was not answered yet, or whose link
        broke, says hello again: that is the same process, which may have heard this router by then."""
        if is_new:
            self._new_processes.add(node_id)
        elif node_id not in self._new_processes:
            self._has_old_process = True

    def claim(self, node_id: NodeId, held: HeldSlot | None, now_s: float, sees_weights: bool = True) -> None:
        """A node registered. What does not fit this mesh, or what the node could not load again (not `sees_weights`),
        is not taken: the node gets a role like any other.

        Of two that claim one slot, the one that came further in it is its holder; the other was replaced and still
        claims it.
        """
        self._deadline_s = now_s + ADOPT_S if self._deadline_s is None else self._deadline_s
        if held is None:
            return
        fits = held.num_slots == len(self._layers) and held.layers == self._layers[held.slot]
        if not fits or not sees_weights or not self.is_pending or held.pipeline in self._adopted:
            self._losers[node_id] = held.lease_term
            return
        slot = StageSlot(PipelineId(held.pipeline), SlotIndex(held.slot))
        rival = self._claims.get(slot)
        if rival is None or rival[0] == node_id or held.last_step > rival[1].last_step:
            self._claims[slot] = (node_id, held)
            if rival is not None and rival[0] != node_id:
                self._losers[rival[0]] = rival[1].lease_term
        else:
            self._losers[node_id] = held.lease_term

    def reject(self, adopted: AdoptedPipeline) -> None:
        """Its holders have no room for it any more."""
        for node_id, lease_term in zip(adopted.holders, adopted.lease_terms, strict=True):
            if node_id is not None:
                self._losers[node_id] = lease_term

    def pop_losers(self) -> dict[NodeId, int]:
        """Returns nodes that must forget a slot that others hold, with the lease term of the claim; each once."""
        losers, self._losers = self._losers, {}
        return losers

    def withdraw(self, node_id: NodeId) -> None:
        """It is gone again."""
        self._claims = {slot: claim for slot, claim in self._claims.items() if claim[0] != node_id}
        self._losers.pop(node_id, None)
        self._new_processes.discard(node_id)

    def has_claim(self, node_id: NodeId) -> bool:
        """Returns whether it waits for its slot."""
        return any(claim[0] == node_id for claim in self._claims.values())

    def pop_complete(self, now_s: float) -> list[AdoptedPipeline]:
        """Returns pipelines whose holders are all back; when the time is up, whatever is claimed."""
        if not self.is_pending or self._deadline_s is None:
            return []
        all_new = not self._has_old_process and len(self._new_processes) >= len(self._layers)
        self.is_pending = now_s < self._deadline_s - (ADOPT_S - NEW_S if all_new else 0.0)
        claimed = sorted({slot.pipeline for slot in self._claims})
        return [self._pop(pipeline) for pipeline in claimed if not self.is_pending or self._is_complete(pipeline)]

    def may_know(self, sequence_id: int) -> bool:
        """Returns whether a node that holds this sequence may still come back."""
        return self.is_pending and sequence_id not in self._known_sequences

    def waits_for_opening(self, now_s: float) -> bool:
        """Returns whether it is worth while to wait for an adopted pipeline to open."""
        return self._deadline_s is not None and now_s < self._deadline_s + OPEN_S

    def _pop(self, pipeline: PipelineId) -> AdoptedPipeline:
        by_slot = [self._claims.pop(slot, None) for slot in self._slots(pipeline)]
        reports = [claim[1] for claim in by_slot if claim is not None]
        self._adopted.add(pipeline)
        self._known_sequences.update(*(report.sequences for report in reports))
        agreed = len({report.num_blocks for report in reports}) == 1
        return AdoptedPipeline(
            pipeline,
            tuple(claim[0] if claim is not None else None for claim in by_slot),
            tuple(claim[1].lease_term if claim is not None else 0 for claim in by_slot),
            reports[0].num_blocks,
            combine(reports, self._block_tokens) if agreed else None,
        )

    def _is_complete(self, pipeline: PipelineId) -> bool:
        """Returns whether all are back, and none looks like a holder that was replaced."""
        if not all(slot in self._claims for slot in self._slots(pipeline)):
            return False
        last_steps = [self._claims[slot][1].last_step for slot in self._slots(pipeline)]
        return max(last_steps) - min(last_steps) <= MAX_STEPS_APART

    def _slots(self, pipeline: PipelineId) -> list[StageSlot]:
        return [StageSlot(pipeline, SlotIndex(index)) for index in range(len(self._layers))]


def read_held_slot(hello: Hello) -> HeldSlot | None:
    """Reads what a stage says of itself; None if it holds nothing. Raises ProtocolError that names the field."""
    if not hello.held_slot:
        return None
    if len(hello.held_slot) != len(SlotReport._fields):
        raise ProtocolError(f"Hello.held_slot has {len(hello.held_slot)} numbers, {len(SlotReport._fields)} are needed")
    said = SlotReport(*hello.held_slot)
    is_slot = said.pipeline < MAX_PIPELINES and said.slot < said.num_slots and said.first_layer < said.stop_layer
    if not is_slot or said.num_blocks < 1:
        raise ProtocolError(f"Hello.held_slot {hello.held_slot} is not a valid slot")
    rows = frame_to_records(hello.held_sequences, HELD_SEQUENCE, None, "Hello.held_sequences")
    blocks = frame_to_array(hello.held_blocks, "int32", (None,), "Hello.held_blocks")
    num_announced = int(rows["num_blocks"].sum())
    is_negative = any((rows[name] < 0).any() for name in HELD_SEQUENCE.fields or ())
    if rows.size and (is_negative or num_announced != blocks.size):
        raise ProtocolError(f"Hello.held_blocks has {blocks.size} blocks, its sequences announce {num_announced}")
    if blocks.size and not 0 <= blocks.min() <= blocks.max() < said.num_blocks:
        raise ProtocolError(f"Hello.held_blocks names a block outside [0, {said.num_blocks})")
    ids, start = blocks.tolist(), 0
    sequences: dict[int, HeldSequence] = {}
    for sequence_id, num_computed, count in rows.tolist():
        sequences[sequence_id] = HeldSequence(tuple(ids[start : start + count]), num_computed)
        start += count
    layers = LayerRange(said.first_layer, said.stop_layer)
    return HeldSlot(
        said.pipeline, said.slot, said.num_slots, layers, said.lease_term, said.num_blocks, said.last_step, sequences
    )


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a node that is to get a role holds from a router before this one."""

    slot: HeldSlot | None
    """What a stage holds."""
    shards: BoolArray | None
    """What an expert node holds."""


def combine(slots: Iterable[HeldSlot], block_tokens: int) -> HeldCache:
    """Returns what can be resumed: sequences that every reporting slot has, as far as all have computed them.

    Tables may differ in length, since a step reaches one stage before the next; where they differ in content, or two
    sequences name one block, nothing of them is of use. But a block that is whole in both may stand at one place in
    both: they begin alike.
    """
    reports = list(slots)
    known = [report.sequences for report in reports]
    everything = sorted(set().union(*known)) if known else []
    kept: dict[int, HeldSequence] = {}
    named: dict[int, tuple[int, int]] = {}
    """Each block's place in its table, and how many positions of that were computed."""
    for sequence_id in everything:
        held = [sequences[sequence_id] for sequences in known if sequence_id in sequences]
        longest = max((entry.block_ids for entry in held), key=len)
        num_computed = min(entry.num_computed for entry in held)
        agree = all(longest[: len(entry.block_ids)] == entry.block_ids for entry in held)
        covered = num_computed <= len(longest) * block_tokens
        if len(held) == len(reports) and agree and covered and num_computed:
            places = [(block, (index, num_computed)) for index, block in enumerate(longest)]
            if all(block not in named or _is_shared(named[block], place, block_tokens) for block, place in places):
                kept[sequence_id] = HeldSequence(longest, num_computed)
                named.update(places)
    released = tuple(number for number in everything if number not in kept)
    return HeldCache(kept, released, {report.slot: report.last_step for report in reports})


def _is_shared(one: tuple[int, int], other: tuple[int, int], block_tokens: int) -> bool:
    """Returns whether a block is whole, and at one place, in two sequences. Each: the place, and positions computed."""
    return one[0] == other[0] and (one[0] + 1) * block_tokens <= min(one[1], other[1])
