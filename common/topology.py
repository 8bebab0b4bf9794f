"""Who holds what: layer ranges, pipeline slots, expert shards. Plain values, ordered, hashable."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from common.ids import Generation, Incarnation, LeaseTerm, NodeId, PipelineId, SlotIndex


class NodeKind(StrEnum):
    """What a node process can become. The router's own incarnation is not a node."""

    STAGE = "stage"
    EXPERT = "expert"


class StageState(StrEnum):
    """How far a stage is with the role that it was told last."""

    SPARE = ""
    LOADING = "loading"
    REFUSED = "refused"
    HOLDING = "holding"
    FILLING = "filling"
    """It mirrors a slot, and its copy is not complete."""
    COMPLETE = "complete"
    """Its copy is."""


class LayerRange(NamedTuple):
    """Decoder layers [start, stop)."""

    start: int
    stop: int


class ShardId(NamedTuple):
    """One slice of one expert of one layer; `slice_index` is 0 where experts are whole."""

    layer: int
    expert: int
    slice_index: int


class SlotReport(NamedTuple):
    """What a stage says of the slot that it holds from a router before this one: `Hello.held_slot`."""

    pipeline: int
    slot: int
    num_slots: int
    first_layer: int
    stop_layer: int
    lease_term: int
    num_blocks: int
    last_step: int


@dataclass(frozen=True, slots=True)
class CheckpointPart:
    """The part of a checkpoint that a folder has."""

    layers: LayerRange | None = None
    """Decoder layers without their experts; with the first one the embedding, with the last one final norm and lm_head.
    None: none."""
    experts: frozenset[int] = frozenset()
    """Whole experts, of every MoE layer."""


@dataclass(frozen=True, slots=True)
class NodeDescription:
    """What a node says of itself when it registers."""

    node_id: NodeId
    incarnation: Incarnation
    kind: NodeKind
    capacity_bytes: int
    """Weights (and, on a stage, KV cache) that it offers to hold."""
    host_label: str
    """Copies of one shard go to different labels where there are any."""
    numeric_class: str
    """Device, instruction set, torch build, kernels: what decides the bits of a result."""
    fingerprint: str
    """The fingerprint of the checkpoint of which it sees all or a part."""
    endpoints: tuple[str, ...]
    """Where its data socket listens; ipc first where it has one."""
    lifeline: tuple[str, ...]
    """Where its lifeline socket listens: the router connects only to see it close."""
    ipc_token: str
    """It proves to another process that both see the same ipc folder on the same host; empty: it does not."""
    process: str = ""
    """HOST/PID as the process itself sees them: for people, who find it by that."""
    part: CheckpointPart | None = None
    """What it can load; None: everything."""
    links: tuple[str, ...] = ()
    """Where native code of an expert node takes calls over tcp; empty: nowhere."""

    @property
    def summary(self) -> dict[str, str | int]:
        """Returns what a log says of a node that has joined."""
        return {
            "kind": self.kind,
            "host": self.host_label,
            "numeric_class": self.numeric_class,
            "capacity_bytes": self.capacity_bytes,
        }

    @property
    def device_kind(self) -> str:
        """Returns `cpu` or `cuda`: the first part of the numeric class."""
        return self.numeric_class.partition("/")[0]

    def can_load_layers(self, layers: LayerRange) -> bool:
        """Returns whether it sees the weights of a slot with these layers."""
        if self.part is None:
            return True
        own = self.part.layers
        return own is not None and own.start <= layers.start and layers.stop <= own.stop


@dataclass(frozen=True, slots=True, order=True)
class StageSlot:
    """A place in a pipeline. Slots are stable: a hole stays a hole until a replacement takes it."""

    pipeline: PipelineId
    index: SlotIndex


@dataclass(frozen=True, slots=True)
class StageRole:
    """A slot as one node holds it now."""

    slot: StageSlot
    layers: LayerRange
    lease_term: LeaseTerm
    generation: Generation
    num_slots: int

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.slot.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it norms, projects to the vocabulary and samples."""
        return self.slot.index == self.num_slots - 1
