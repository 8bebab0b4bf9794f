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
    return AssignStage(
        pipeline=slot.pipeline,
        slot=slot.index,
        num_slots=len(layers),
        first_layer=layers[slot.index].start,
        stop_layer=layers[slot.index].stop,
        lease_term=lease_term,
        num_blocks=num_blocks,
        downstream=downstream[0],
        downstream_ipc_token=downstream[1],
    )


def assign_mirror(
    slot: StageSlot, layers: Sequence[LayerRange], lease_term: LeaseTerm, num_blocks: int, holder: NodeDescription
) -> AssignMirror:
    """The same for whoever is to follow the slot's holder."""
    return AssignMirror(
        pipeline=slot.pipeline,
        slot=slot.index,
        num_slots=len(layers),
        first_layer=layers[slot.index].start,
        stop_layer=layers[slot.index].stop,
        lease_term=lease_term,
        num_blocks=num_blocks,
        primary=holder.endpoints,
        primary_ipc_token=holder.ipc_token,
    )
