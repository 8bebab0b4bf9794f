"""What the control logic asks of the mesh thread: plain values, carried out in order."""

from __future__ import annotations

from dataclasses import dataclass

from common.ids import Generation, NodeId, PipelineId
from common.messages import Header, Message


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


@dataclass(frozen=True, slots=True)
class ClosePipeline:
    """A slot is lost or changes hands: no more steps until it is opened again."""

    pipeline: PipelineId


Action = Tell | OpenPipeline | ClosePipeline
