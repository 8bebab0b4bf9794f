"""The expert shards that a node holds: load from the checkpoint, self-test, look up, let go.

F expert width, D model width, S slices an expert. Slice i of S is rows [i*F/S, (i+1)*F/S) of gate and up and the same
columns of down; the outputs of all slices add up to the expert's.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from common.checkpoint.model_config import ModelConfig
from common.checkpoint.weights import CheckpointWeights
from common.compute.gated_ffn import GatedExpert, grouped_gated_ffn
from common.compute.native_library import NativeKernels
from common.topology import ShardId
from services.expert.shard_probe import PROBE_ROWS, ProbeAnswer, check_answer, probe_rows, summarise, torch_answer


class ShardStore:
    """Shards by id. Loading may run in another thread: a shard appears whole or not at all."""

    def __init__(self, config: ModelConfig, num_slices: int, kernels: NativeKernels | None) -> None:
        self._config = config
        self.num_slices = num_slices
        self._kernels = kernels
        self._shards: dict[ShardId, GatedExpert] = {}
        self._bytes: dict[ShardId, int] = {}
        self._probes: dict[ShardId, ProbeAnswer] = {}

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[ShardId]:
        return iter(list(self._shards))

    @property
    def weight_bytes(self) -> int:
        """As stored in the checkpoint."""
        return sum(self._bytes.values())

    def find(self, shard: ShardId) -> GatedExpert | None:
        """The shard's weights, or None if it is not held."""
        return self._shards.get(shard)

    def load(self, weights: CheckpointWeights, shard: ShardId) -> None:
        """Read one shard and let it answer the probe. Raises CheckpointError if it is missing, misshapen or not finite,
        and ExecutionError where the kernels answer otherwise than torch."""
        before = weights.bytes_read
        gate, up, down = self._read(weights, shard)
        expert = GatedExpert(gate, up, down, kernels=self._kernels)
        rows = probe_rows(self._config.hidden_size).to(weights.dtype).to(weights.device)
        answer = grouped_gated_ffn(rows, (0, PROBE_ROWS), (expert,)).cpu()
        check_answer(answer, torch_answer(rows, gate, up, down).cpu(), shard)
        self._bytes[shard] = weights.bytes_read - before
        self._probes[shard] = summarise(answer)
        self._shards[shard] = expert

    def probe(self, shard: ShardId) -> ProbeAnswer:
        """What a shard that is held answered."""
        return self._probes[shard]

    def drop(self, shard: ShardId) -> None:
        """Let a shard go; one that is not held is no error."""
        self._shards.pop(shard, None)
        self._bytes.pop(shard, None)
        self._probes.pop(shard, None)

    def _read(self, weights: CheckpointWeights, shard: ShardId) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down."""
        config, names = self._config, self._config.expert_names
        width, hidden = config.expert_intermediate_size, config.hidden_size
        cut = slice(width * shard.slice_index // self.num_slices, width * (shard.slice_index + 1) // self.num_slices)
        prefix = f"model.layers.{shard.layer}"
        gate_name = f"{prefix}.{names.gate.format(expert=shard.expert)}"
        if gate_name not in weights and f"{prefix}.{names.fused_gate_up}" in weights:
            return self._read_fused(weights, shard, prefix, cut)
        return (
            weights.tensor(gate_name, (width, hidden), rows=cut),
            weights.tensor(f"{prefix}.{names.up.format(expert=shard.expert)}", (width, hidden), rows=cut),
            weights.tensor(f"{prefix}.{names.down.format(expert=shard.expert)}", (hidden, width), columns=cut),
        )

    def _read_fused(
        self, weights: CheckpointWeights, shard: ShardId, prefix: str, cut: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All experts of a layer in one tensor: gate rows before up rows."""
        config, names = self._config, self._config.expert_names
        width, hidden = config.expert_intermediate_size, config.hidden_size
        gate_up_name, gate_up_shape = f"{prefix}.{names.fused_gate_up}", (config.num_experts, 2 * width, hidden)
        up_cut = slice(cut.start + width, cut.stop + width)
        return (
            weights.tensor(gate_up_name, gate_up_shape, index=shard.expert, rows=cut),
            weights.tensor(gate_up_name, gate_up_shape, index=shard.expert, rows=up_cut),
            weights.tensor(
                f"{prefix}.{names.fused_down}", (config.num_experts, hidden, width), index=shard.expert, columns=cut
            ),
        )
