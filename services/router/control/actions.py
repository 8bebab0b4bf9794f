"""What the control logic asks of the mesh thread: plain values, carried out in order."""

from __future__ import annotations

from dataclasses import dataclass

from common.ids import Generation, NodeId, PipelineId
from common.messages import Header, Message
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
    """By slot: up to which step its paged memory is good."""
    held: HeldCache | None = None
    """Of a pipeline that a router before this one had open."""

    @property
    def summary(self) -> dict[str, int | tuple[int, ...]]:
        """What a log says of it."""
        return {
            "pipeline": self.pipeline,
            "generation": self.generation,
            "num_blocks": self.num_blocks,
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
