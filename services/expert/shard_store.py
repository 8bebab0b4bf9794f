"""The expert shards that a node holds: load from the checkpoint, self-test, look up, let go.

Every shard answers a known question, the probe, before it is used. The answer is compared twice: here with torch's,
which finds kernels that compute wrongly, and by the router with those of other nodes that hold the shard, which finds
weights that differ.

F expert width, D model width, S slices an expert. Slice i of S is rows [i*F/S, (i+1)*F/S) of gate and up and the same
columns of down; the outputs of all slices add up to the expert's.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from common.checkpoint.model_config import ModelConfig
from common.checkpoint.weights import CheckpointWeights
from common.compute.gated_ffn import GatedExpert, grouped_gated_ffn
from common.compute.native_library import NativeKernels
from common.errors import CheckpointError, ExecutionError
from common.topology import ShardId

ShardWatcher = Callable[[Mapping[ShardId, GatedExpert | None]], None]
"""Hears of shards that are there now, or, with None, go."""


class ShardStore:
    """Shards by id. Loading may run in another thread: a shard appears whole or not at all."""

    def __init__(self, config: ModelConfig, num_slices: int, dtype: torch.dtype, kernels: NativeKernels | None) -> None:
        self.config = config
        self.num_slices = num_slices
        self.dtype = dtype
        self._kernels = kernels
        self._shards: dict[ShardId, GatedExpert] = {}
        self._probes: dict[ShardId, ProbeAnswer] = {}
        self._watcher: ShardWatcher | None = None
        self._watching = threading.Lock()

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[ShardId]:
        return iter(list(self._shards))

    def find(self, shard: ShardId) -> GatedExpert | None:
        """Returns the shard's weights, or None if it is not held."""
        return self._shards.get(shard)

    def load(self, weights: CheckpointWeights, shard: ShardId) -> None:
        """Reads one shard and lets it answer the probe. Raises CheckpointError if it is missing, misshapen or not
        finite, and ExecutionError where the kernels answer otherwise than torch."""
        gate, up, down = self._read(weights, shard)
        expert = GatedExpert(gate, up, down, kernels=self._kernels)
        rows = probe_rows(self.config.hidden_size).to(weights.dtype).to(weights.device)
        answer = grouped_gated_ffn(rows, (0, PROBE_ROWS), (expert,)).cpu()
        check_answer(answer, torch_answer(rows, gate, up, down).cpu(), shard)
        with self._watching:
            former = self._shards.get(shard)
            self._probes[shard] = summarise(answer)
            self._shards[shard] = expert
            self._tell({shard: expert})
        del former  # one that was loaded twice: whoever is told does not use it any more

    def probe(self, shard: ShardId) -> ProbeAnswer:
        """Returns what a shard that is held answered."""
        return self._probes[shard]

    def drop(self, *shards: ShardId) -> None:
        """Lets shards go; one that is not held is not an error."""
        with self._watching:
            self._tell(dict.fromkeys(shards))
            for shard in shards:
                self._shards.pop(shard, None)
                self._probes.pop(shard, None)

    def watch(self, watcher: ShardWatcher | None) -> None:
        """Tells of all shards that are held, and from now on of each that comes, from the loader's thread, or goes.
        Weights that go are freed after whoever is told has returned. None: tells nobody, and nobody is being told."""
        with self._watching:
            self._watcher = watcher
            self._tell(dict(self._shards))

    def _tell(self, changed: Mapping[ShardId, GatedExpert | None]) -> None:
        """To be called with the lock: what is told is in the order in which it happened."""
        if self._watcher is not None and changed:
            self._watcher(changed)

    def _read(self, weights: CheckpointWeights, shard: ShardId) -> tuple[Tensor, Tensor, Tensor]:
        """Reads gate, up and down."""
        config, names = self.config, self.config.expert_names
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
        """Returns all experts of a layer in one tensor: gate rows before up rows."""
        config, names = self.config, self.config.expert_names
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


PROBE_ROWS: Final = 4
"""Rows of the probe: more than one, so that the kernels' blocks of rows are tried too."""
TOLERANCE: Final[dict[torch.dtype, float]] = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""The greatest difference from torch, against the size of the answer."""


class ProbeAnswer(NamedTuple):
    """What is compared."""

    digest: int
    """A digest of the bits, above 0: equal on nodes of one numeric class."""
    projection: float
    """The answer along a fixed direction, over its length: nearly equal on all nodes."""


def probe_rows(width: int) -> Tensor:
    """Returns float32 [PROBE_ROWS, width]: of about the size of normed rows, and exact in bfloat16."""
    return _pattern(PROBE_ROWS, width) / 64.0


def torch_answer(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Returns the gated feed-forward network as torch computes it."""
    return linear(silu(linear(rows, gate)) * linear(rows, up), down)


def check_answer(answer: Tensor, by_torch: Tensor, shard: ShardId) -> None:
    """Raises CheckpointError for numbers that are not finite, ExecutionError for an answer that is not torch's."""
    if not bool(torch.isfinite(answer).all()):
        raise CheckpointError(
            f"expert {shard.expert} of layer {shard.layer} gives numbers that are not finite: it is damaged"
        )
    expected = by_torch.float()
    difference, size = float((answer.float() - expected).norm()), float(expected.norm())
    if difference > TOLERANCE.get(answer.dtype, 0.05) * size + 1e-30:
        raise ExecutionError(
            f"expert {shard.expert} of layer {shard.layer}: the kernels' answer to the probe is {difference:.3g} away "
            f"from torch's, which is {size:.3g} long"
        )


def summarise(answer: Tensor) -> ProbeAnswer:
    """Summarises an answer [PROBE_ROWS, D] on the host."""
    contiguous = answer.contiguous()
    digest = zlib.crc32(contiguous.view(torch.uint8).numpy().tobytes()) & 0x7FFFFFFF
    numbers = contiguous.double()
    length = float(numbers.norm())
    direction = torch.where(_pattern(*numbers.shape) >= 0, 1.0, -1.0).double()
    return ProbeAnswer(max(1, digest), float((numbers * direction).sum()) / length if length else 0.0)


def _pattern(rows: int, columns: int) -> Tensor:
    """Returns float32 whole numbers in [-128, 128) without visible order."""
    places = torch.arange(rows * columns, dtype=torch.int64).reshape(rows, columns)
    mixed = (places * 2654435761 + 12345) % (1 << 32)
    return ((mixed >> 13) % 256 - 128).to(torch.float32)
