"""What the control logic asks of the mesh thread: plain values, carried out in order; and what stages are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.ids import Generation, LeaseTerm, NodeId, PipelineId
from common.messages import AssignMirror, AssignStage, Header, Message, Unassign
from common.topology import LayerRange, NodeDescription, StageSlot
from services.router.control.adoption import HeldCache


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a control message to a node."""

    node_id: NodeId
    message: Message
    header: Header


@dataclass(frozen=True, slots=True)
class OpenPipeline:
    """All slots are ready in this generation: steps may go to its first stage."""

    pipeline: PipelineId
    generation: Generation
    first_stage: NodeId
    num_blocks: int
    num_slots: int
    kv_marks: tuple[int, ...] = ()
    """Up to which step a slot's paged memory is good, by slot."""
    held: HeldCache | None = None
    """What stages hold of a pipeline that a router before this one had open."""
    num_tier_slots: int = 0
    """Blocks that the session tier of each slot's holder has room for."""
    tier_since: int = 0
    """All tiers have what steps behind this one have saved, up to the marks."""

    @property
    def summary(self) -> dict[str, int | tuple[int, ...]]:
        """Returns what a log says of it."""
        return {
            "pipeline": self.pipeline,
            "generation": self.generation,
            "num_blocks": self.num_blocks,
            "num_tier_slots": self.num_tier_slots,
            "kv_marks": self.kv_marks,
        }


@dataclass(frozen=True, slots=True)
class SuspendPipeline:
    """A slot is lost or changes hands: no more steps until it is opened again. Its requests keep their blocks."""

    pipeline: PipelineId


@dataclass(frozen=True, slots=True)
class ClosePipeline:
    """It is not coming back soon, or not with its blocks: its requests go elsewhere."""

    pipeline: PipelineId


Action = Tell | OpenPipeline | SuspendPipeline | ClosePipeline


class RoleMessages:
    """Makes what stages are told of their roles. One count numbers it all, generations of pipelines too: of two roles a
    node knows the newer one, in whatever order they come."""

    def __init__(self, layers: Sequence[LayerRange], results: tuple[tuple[str, ...], str], last_number: int) -> None:
        """`layers` of all slots; `results`: endpoints and ipc token of the router's socket for results."""
        self.layers = layers
        self._results = results
        self._last_number = last_number

    def draw_number(self) -> int:
        """Returns the next number."""
        self._last_number += 1
        return self._last_number

    def assign(
        self,
        slot: StageSlot,
        holders: Sequence[NodeDescription],
        lease_term: LeaseTerm,
        num_blocks: int,
        num_tier_slots: int,
        generation: Generation,
    ) -> Tell:
        """Tells a slot's holder its role. `holders`: of all slots of its pipeline."""
        downstream = self._results
        first: tuple[tuple[str, ...], str] = (), ""
        if slot.index < len(holders) - 1:
            following = holders[slot.index + 1]
            downstream = following.endpoints, following.ipc_token
        elif slot.index > 0:
            first = holders[0].endpoints, holders[0].ipc_token
        message = AssignStage(*self._place(slot), lease_term, num_blocks, *downstream, *first, num_tier_slots)
        return Tell(holders[slot.index].node_id, message, Header(generation=generation))

    def mirror(self, slot: StageSlot, lease_term: LeaseTerm, num_blocks: int, holder: NodeDescription) -> AssignMirror:
        """Makes the message to the node that is to follow the slot's holder."""
        return AssignMirror(*self._place(slot), lease_term, num_blocks, holder.endpoints, holder.ipc_token)

    def unassign(self, node_id: NodeId, lease_term: int) -> Tell:
        """Tells a node that it is a spare."""
        return Tell(node_id, Unassign(lease_term), Header(generation=self.draw_number()))

    def _place(self, slot: StageSlot) -> tuple[int, int, int, int, int]:
        """Returns pipeline, slot, slots, first and stop layer: the first fields of both messages."""
        own = self.layers[slot.index]
        return slot.pipeline, slot.index, len(self.layers), own.start, own.stop
