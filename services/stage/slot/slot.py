"""What a stage has of a slot: its layers, its memory, and the assignment that they are for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from common.compute.native_library import NativeKernels
from common.errors import MoemeshError
from common.ids import Generation, LeaseTerm, PipelineId, SlotIndex
from common.messages import AssignMirror, AssignStage, Header, Hello, MirrorReady, StageReady, StepResult
from common.topology import LayerRange, SlotReport, StageRole, StageSlot
from common.wire.array import array_to_frame
from common.wire.records import HELD_SEQUENCE, records_to_frame
from common.wire.transport import MessageSocket
from services.stage.model.executor import Executor
from services.stage.model.kv_cache import PagedMemory
from services.stage.model.logit_adjustments import KeptAdjustments
from services.stage.model.micro_batch import BlockTables
from services.stage.slot.early_steps import EarlySteps
from services.stage.slot.layers import LayersLoad
from services.stage.slot.session_tier import SessionTier
from services.stage.slot.step_watermark import StepWatermark


class MemoryTag(NamedTuple):
    """Which paged memory this is. Of another slot or size, nothing of it is of use."""

    pipeline: int
    slot: int
    num_slots: int
    layers: LayerRange
    num_blocks: int
    dtype: torch.dtype


@dataclass(slots=True)
class HeldMemory:
    """Paged memory, whose it is, and how far it is filled."""

    tag: MemoryTag
    memory: PagedMemory
    tables: BlockTables
    watermark: StepWatermark
    tier: SessionTier


@dataclass(frozen=True, slots=True)
class Loading:
    """An assignment whose layers are on their way."""

    message: AssignStage | AssignMirror
    header: Header
    load: LayersLoad


@dataclass(slots=True)
class Slot:
    """The slot that this stage serves now."""

    role: StageRole
    router_term: int
    executor: Executor
    held: HeldMemory
    downstream: MessageSocket
    sampling_kernels: NativeKernels | None = None
    """What chooses tokens on the last slot; None: numpy and torch do, by the same rules."""
    last_sequence_number: int = 0
    """The last sequence number of the messages from upstream."""
    adjustments: KeptAdjustments = field(default_factory=KeptAdjustments)
    """On the last slot, in this generation."""
    early_steps: EarlySteps = field(default_factory=EarlySteps)
    """Steps that have come and have not begun. Only on the first slot do any wait."""
    first_stage: MessageSocket | None = None
    """On the last slot of several: to the first one, which waits for what is sampled."""
    untold: tuple[StepResult, Header] | None = None
    """The newest result that the first stage has not taken yet."""
    takes_steps: bool = True
    """Not between a hello, which says what is held here, and the assignment that follows it."""

    def takes(self, stamp: tuple[int, int]) -> bool:
        """Returns whether a step of this router's term and generation is one for this slot."""
        return self.takes_steps and stamp == (self.router_term, self.role.generation)

    def close(self) -> None:
        """Closes its sockets."""
        self.downstream.close()
        if self.first_stage is not None:
            self.first_stage.close()

    def add_to(self, hello: Hello) -> Hello:
        """Adds what a router that has been restarted is told with the hello."""
        tag = self.held.tag
        sequences, blocks = self.held.tables.held()
        return replace(
            hello,
            held_slot=SlotReport(
                pipeline=tag.pipeline,
                slot=tag.slot,
                num_slots=tag.num_slots,
                first_layer=tag.layers.start,
                stop_layer=tag.layers.stop,
                lease_term=self.role.lease_term,
                num_blocks=tag.num_blocks,
                last_step=self.held.watermark.newest,
            ),
            held_sequences=records_to_frame(sequences, HELD_SEQUENCE),
            held_blocks=array_to_frame(blocks),
        )


@dataclass(frozen=True, slots=True)
class RoleTaken:
    """The slot is loaded, tested and connected; or it is mirrored from now on."""

    ready: StageReady | MirrorReady
    header: Header


@dataclass(frozen=True, slots=True)
class RoleRefused:
    """The slot cannot be taken."""

    error: MoemeshError
    header: Header


def role_of(message: AssignStage | AssignMirror, header: Header) -> StageRole:
    """Returns the role that an assignment stands for."""
    return StageRole(
        slot=StageSlot(PipelineId(message.pipeline), SlotIndex(message.slot)),
        layers=LayerRange(message.first_layer, message.stop_layer),
        lease_term=LeaseTerm(message.lease_term),
        generation=Generation(header.generation),
        num_slots=message.num_slots,
    )
