"""What a stage is told of the slot that it is to hold or to mirror. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from common.ids import LeaseTerm
from common.messages import AssignMirror, AssignStage
from common.topology import LayerRange, NodeDescription, StageSlot


def assign_stage(
    slot: StageSlot,
    layers: Sequence[LayerRange],
    lease_term: LeaseTerm,
    num_blocks: int,
    downstream: tuple[tuple[str, ...], str],
) -> AssignStage:
    """`layers` of all slots; `downstream`: endpoints and ipc token of the next slot's holder or of the router."""
    return AssignStage(*_place(slot, layers), lease_term, num_blocks, *downstream)


def assign_mirror(
    slot: StageSlot, layers: Sequence[LayerRange], lease_term: LeaseTerm, num_blocks: int, holder: NodeDescription
) -> AssignMirror:
    """The same for whoever is to follow the slot's holder."""
    return AssignMirror(*_place(slot, layers), lease_term, num_blocks, holder.endpoints, holder.ipc_token)


def _place(slot: StageSlot, layers: Sequence[LayerRange]) -> tuple[int, int, int, int, int]:
    """Pipeline, slot, slots, first and stop layer: the first fields of both messages."""
    own = layers[slot.index]
    return slot.pipeline, slot.index, len(layers), own.start, own.stop
