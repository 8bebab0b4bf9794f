"""A whole pipeline and its expert nodes in this process: stages, shards and dispatch as they are, without sockets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint.model_config import read_model_config
from common.checkpoint.weights import CheckpointWeights
from common.compute.device import HOST, Device
from common.compute.native_library import NativeKernels
from common.ids import Generation, LeaseTerm, PipelineId, SequenceId, SlotIndex, StepId
from common.messages import Dispatch, Header, Step
from common.topology import LayerRange, ShardId, StageRole, StageSlot
from common.wire.array import array_to_frame
from common.wire.tensor import tensor_to_frame
from services.expert.calls import check_call
from services.expert.shard_store import ShardStore
from services.router.control.sizes import balance_layers
from services.router.engine import SamplingParameters
from services.router.mesh.step_message import step_message
from services.router.scheduling.step_plan import ScheduledChunk, StepPlan
from services.stage.experts.dispatch import ExactSum, PartialSum, pair_weights, split_pairs
from services.stage.model.decoder import ExpertCall, StageModel
from services.stage.model.loading import load_stage
from services.stage.model.micro_batch import BlockTables, MicroBatch, read_micro_batch
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, KvShape, allocate_kv_cache
from tests.support.nodes.answered_calls import answer_calls

GREEDY = SamplingParameters(16, 0.0, 1.0, 0, 0, None, frozenset())
NUM_BLOCKS = 64


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a sequence."""

    sequence_id: int
    token_ids: tuple[int, ...]


@dataclass
class LocalPipeline:
    """Stages over all layers, and expert nodes that each hold every shard; `num_nodes` share the rows of a call."""

    directory: Path
    pp: int = 1
    num_nodes: int = 1
    num_slices: int = 1
    combine: str = "exact"
    dtype: torch.dtype = torch.float32
    kernels: NativeKernels | None = None
    num_positions: int = 2048
    device: Device = HOST
    lengths: dict[int, int] = field(default_factory=dict)
    blocks: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = read_model_config(self.directory)
        weights = CheckpointWeights(self.directory, self.dtype, self.device.place)
        ranges = balance_layers([1.0] * self.config.num_layers, 0.0, 0.0, self.pp)
        self.models = [
            load_stage(weights, self.config, self._role(index, span), self.num_positions, self.kernels, self.device)
            for index, span in enumerate(ranges)
        ]
        self.caches = [
            allocate_kv_cache(
                KvShape(len(model.layers), NUM_BLOCKS, self.config.num_kv_heads, self.config.head_dim, self.dtype),
                partial(torch.zeros, device=self.device.place),
            )
            for model in self.models
        ]
        self.tables = [BlockTables(KV_BLOCK_TOKENS, NUM_BLOCKS) for _ in self.models]
        self.store = ShardStore(self.config, self.num_slices, self.dtype, self.kernels)
        for layer in self.config.moe_layer_indices:
            for expert in range(self.config.num_experts):
                for piece in range(self.num_slices):
                    self.store.load(weights, ShardId(layer, expert, piece))
        self._free_blocks = list(reversed(range(NUM_BLOCKS)))  # so that no sequence's blocks stand in order

    def output(self, chunks: Sequence[Chunk], released: Sequence[int] = ()) -> Tensor:
        """[T, V]: logits of every token of one micro-batch."""
        step = self.step(chunks, released)
        hidden = torch.tensor([token for chunk in chunks for token in chunk.token_ids], dtype=torch.int64)
        for model, caches, tables in zip(self.models, self.caches, self.tables, strict=True):
            batch = replace(read_micro_batch(step, hidden, tables), sampling_rows=torch.arange(hidden.shape[0]))
            hidden = self.run(model, batch, caches)
        return hidden

    def logits(self, chunks: Sequence[Chunk]) -> Tensor:
        """[T, V] of every token of the micro-batch."""
        return self.output(chunks)

    def run(self, model: StageModel, batch: MicroBatch, caches: list) -> Tensor:  # type: ignore[type-arg]
        """One stage's forward pass."""
        with torch.inference_mode():
            forward = model.forward(batch, caches)
            try:
                answer = None
                while True:
                    wanted = forward.send(answer)
                    answer = self.answer(wanted) if isinstance(wanted, ExpertCall) else None
            except StopIteration as stop:
                result: Tensor = stop.value
                return result

    def answer(self, call: ExpertCall) -> Tensor:
        """What a call's nodes would answer, put together."""
        num_keys = self.config.num_experts * self.num_slices
        pairs = np.arange(call.experts.numel() * self.num_slices)
        parts = split_pairs(call, pairs, self.num_slices, [list(range(self.num_nodes))] * num_keys, {})
        total = ExactSum(call, self.num_slices) if self.combine == "exact" else PartialSum(call)
        for part in reversed(parts):
            weights = pair_weights(call, part, self.num_slices)
            message = Dispatch(
                1,
                tensor_to_frame(call.hidden[torch.from_numpy(part.tokens)]),
                array_to_frame(part.routing),
                array_to_frame(weights[: 0 if self.combine == "exact" else None]),
            )
            waiting = check_call(b"s", message, Header(layer=call.layer), 0.0, self.store)
            total.add(part, answer_calls([waiting], self.store, self.device)[0])
        return total.total()

    def step(self, chunks: Sequence[Chunk], released: Sequence[int] = ()) -> Step:
        """The step message of a micro-batch, blocks drawn as they are needed."""
        return step_message(
            StepPlan(
                StepId(1),
                PipelineId(0),
                Generation(1),
                tuple(self._scheduled(chunk) for chunk in chunks),
                tuple(SequenceId(sequence) for sequence in released),
            )
        )

    def _scheduled(self, chunk: Chunk) -> ScheduledChunk:
        start, known = self.lengths.get(chunk.sequence_id, 0), self.blocks.setdefault(chunk.sequence_id, [])
        stop = start + len(chunk.token_ids)
        new = [self._free_blocks.pop() for _ in range(-(-stop // KV_BLOCK_TOKENS) - len(known))]
        scheduled = ScheduledChunk(
            SequenceId(chunk.sequence_id), chunk.token_ids, start, len(known), tuple(new), True, GREEDY, 0, 0
        )
        self.lengths[chunk.sequence_id] = stop
        known += new
        return scheduled

    def _role(self, index: int, span: LayerRange) -> StageRole:
        slot = StageSlot(PipelineId(0), SlotIndex(index))
        return StageRole(slot, span, LeaseTerm(1), Generation(1), self.pp)
