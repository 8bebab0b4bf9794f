"""From a checkpoint to one stage's weights: the names and shapes that a layer range needs, and no others.

Of layers that are cut over ranks, a rank reads its own part: no byte of another rank's. A rank may have several parts
(`TpShard`); each is read by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.checkpoint.model_config import ModelConfig
from common.checkpoint.tensor_names import embedding_name, lm_head_name
from common.checkpoint.weights import CheckpointWeights
from common.compute.device import HOST, Device
from common.compute.expert_choice import ExpertChoice
from common.compute.gated_ffn import GatedExpert
from common.compute.linear import PackedLinear
from common.compute.native_library import NativeKernels
from common.compute.rms_norm import Norm
from common.topology import StageRole
from services.stage.model.attention import Attention, AttentionHeads, RotaryTable, repeat_norm_weights
from services.stage.model.decoder import DecoderLayer, StageModel
from services.stage.model.layer_half.composed import ComposedHalf, Gate
from services.stage.model.layer_half.native import layer_half
from services.stage.model.sharded_linear import (
    ALONE,
    Embedding,
    GatedColumns,
    OrderedOutput,
    ShardedColumns,
    ShardedFeedForward,
    Sharding,
    SummedOutput,
)
from services.stage.model.tp_shard import TpShard


def load_stage(
    weights: CheckpointWeights,
    config: ModelConfig,
    role: StageRole,
    num_positions: int,
    kernels: NativeKernels | None,
    device: Device = HOST,
    sharding: Sharding = ALONE,
) -> StageModel:
    """Loads what a role needs to `device`, where `weights` are wanted; of what is cut over ranks, one rank's part.

    Raises CheckpointError for a tensor that is missing or has another shape.
    """
    loader = PartLoader(weights, config, kernels, sharding)
    return StageModel(
        layers=tuple(loader.layer(index) for index in range(role.layers.start, role.layers.stop)),
        rotary=RotaryTable(config.rope, config.head_dim, num_positions, weights.dtype, weights.device),
        embedding=loader.embedding() if role.is_first else None,
        final_norm=loader.norm("model.norm") if role.is_last else None,
        lm_head=loader.lm_head() if role.is_last else None,
        device=device,
        is_first_rank=sharding.shard.rank == 0,
    )


class PartLoader:
    """Reads one rank's part of a stage's tensors. Raises CheckpointError for a tensor that is missing or has another
    shape than config.json says."""

    def __init__(
        self,
        weights: CheckpointWeights,
        config: ModelConfig,
        kernels: NativeKernels | None,
        sharding: Sharding,
    ) -> None:
        self._weights = weights
        self._config = config
        self._kernels = kernels
        self._shard = sharding.shard
        self._collectives = sharding.collectives

    def layer(self, index: int) -> DecoderLayer:
        """Loads one whole layer of the model."""
        prefix = f"model.layers.{index}"
        has_experts = self._config.moe_layers[index]
        half = ComposedHalf(
            input_norm=self.norm(f"{prefix}.input_layernorm"),
            attention=self.attention(index),
            post_attention_norm=self.norm(f"{prefix}.post_attention_layernorm"),
            gate=self.gate(index) if has_experts else None,
        )
        return DecoderLayer(index, layer_half(half, self._kernels), None if has_experts else self.dense(index))

    def norm(self, name: str) -> Norm:
        """Loads a norm's weight, of which every rank has all."""
        weight = self._weights.tensor(f"{name}.weight", (self._config.hidden_size,))
        return Norm(weight, self._config.rms_norm_eps, self._kernels)

    def attention(self, layer: int) -> Attention:
        """Loads the projections of this rank's heads, and what makes the output of all of them."""
        config, parts = self._config, self._shard.parts
        width = config.num_heads * config.head_dim
        return Attention(
            tuple(self._heads(layer, part) for part in parts),
            self._second(
                f"model.layers.{layer}.self_attn.o_proj",
                width,
                [_times(part.even(config.num_heads), config.head_dim) for part in parts],
                has_bias=config.attention_bias,
            ),
        )

    def _heads(self, layer: int, part: TpShard) -> AttentionHeads:
        config, prefix = self._config, f"model.layers.{layer}.self_attn"
        width = config.head_dim
        heads, kv_heads = part.even(config.num_heads), part.kv_heads(config.num_kv_heads)
        projections = (
            ("q_proj", config.num_heads, heads),
            ("k_proj", config.num_kv_heads, kv_heads),
            ("v_proj", config.num_kv_heads, kv_heads),
        )
        qkv = [
            self._weights.tensor(
                f"{prefix}.{name}.weight", (count * width, config.hidden_size), rows=_times(own, width)
            )
            for name, count, own in projections
        ]
        qkv_bias = None
        if config.attention_bias:
            qkv_bias = torch.cat(
                [
                    self._weights.tensor(f"{prefix}.{name}.bias", (count * width,), rows=_times(own, width))
                    for name, count, own in projections
                ]
            )
        num_heads, num_kv_heads = heads.stop - heads.start, kv_heads.stop - kv_heads.start
        first = self._shard.kv_heads(config.num_kv_heads).start
        return AttentionHeads(
            qkv=PackedLinear(torch.cat(qkv), qkv_bias, kernels=self._kernels),
            query_key_norm=self._query_key_norm(prefix, num_heads, num_kv_heads),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            kv_heads=slice(kv_heads.start - first, kv_heads.stop - first),
            head_dim=width,
            rms_norm_eps=config.rms_norm_eps,
            sliding_window=config.sliding_window,
            kernels=self._kernels,
        )

    def dense(self, layer: int) -> GatedExpert | ShardedFeedForward:
        """Loads a feed-forward network without experts: whole, or this rank's columns of its linears."""
        width = self._config.dense_intermediate_size
        if self._shard.is_whole:
            gate, up = self._gate_and_up(layer, slice(0, width))
            down = self._weights.tensor(f"model.layers.{layer}.mlp.down_proj.weight", (self._config.hidden_size, width))
            return GatedExpert(gate, up, down, kernels=self._kernels)
        spans = [part.even(width) for part in self._shard.parts]
        packed = [
            [PackedLinear(weight, kernels=self._kernels) for weight in self._gate_and_up(layer, span)] for span in spans
        ]
        return ShardedFeedForward(
            tuple(GatedColumns(gate, up, self._kernels) for gate, up in packed),
            self._second(f"model.layers.{layer}.mlp.down_proj", width, spans, has_bias=False),
        )

    def _gate_and_up(self, layer: int, span: slice) -> list[Tensor]:
        shape = (self._config.dense_intermediate_size, self._config.hidden_size)
        names = (f"model.layers.{layer}.mlp.{name}.weight" for name in ("gate_proj", "up_proj"))
        return [self._weights.tensor(name, shape, rows=span) for name in names]

    def gate(self, layer: int) -> Gate | None:
        """Loads what says which experts a token goes to; the first rank alone asks them, and others get None."""
        if self._shard.rank > 0:
            return None
        config, prefix = self._config, f"model.layers.{layer}"
        shape = (config.num_experts, config.hidden_size)
        # Newer Mixtral files name the gate as Qwen3-MoE does.
        name = config.expert_names.router
        name = name if f"{prefix}.{name}" in self._weights else "mlp.gate.weight"
        return Gate(
            PackedLinear(self._weights.tensor(f"{prefix}.{name}", shape), kernels=self._kernels),
            ExpertChoice(
                config.num_experts_per_token,
                normalize=config.normalize_expert_weights,
                round_weights=not config.gate_weights_in_float32,
            ),
        )

    def embedding(self) -> Callable[[Tensor], Tensor]:
        """Loads this rank's columns of the table; what is returned turns token ids into rows of all columns."""
        config = self._config
        name, shape = embedding_name(config, self._weights), (config.vocab_size, config.hidden_size)
        spans = [part.even(config.hidden_size) for part in self._shard.parts]
        tables = [self._weights.tensor(name, shape, columns=span) for span in spans]
        return self._columns([Embedding(table) for table in tables], config.hidden_size)

    def lm_head(self) -> Callable[[Tensor], Tensor]:
        """Loads this rank's tokens of the vocabulary; what is returned gives the logits of all."""
        return self._columns([self._tokens(part) for part in self._shard.parts], self._config.vocab_size)

    def _columns(self, parts: Sequence[Callable[[Tensor], Tensor]], num_columns: int) -> Callable[[Tensor], Tensor]:
        return parts[0] if self._shard.is_whole else ShardedColumns(tuple(parts), self._collectives, num_columns)

    def _tokens(self, part: TpShard) -> PackedLinear:
        """Loads one part of the lm_head. All parts have one size, so the last ones may end in rows of 0."""
        config = self._config
        own = part.padded(config.vocab_size)
        rows = slice(min(own.start, config.vocab_size), min(own.stop, config.vocab_size))
        name, shape = lm_head_name(config, self._weights), (config.vocab_size, config.hidden_size)
        weight = self._weights.tensor(name, shape, rows=rows)
        lacking = own.stop - own.start - weight.shape[0]
        if lacking:
            weight = torch.cat((weight, weight.new_zeros((lacking, config.hidden_size))))
        return PackedLinear(weight, kernels=self._kernels)

    def _second(self, name: str, width: int, spans: Sequence[slice], *, has_bias: bool) -> Callable[[Tensor], Tensor]:
        """Loads the linear that ends a half of a layer, [D, width]: output columns, or in `fast` what this rank's span
        of the input, `spans` of its parts, adds to all of them."""
        shard, hidden_size = self._shard, self._config.hidden_size
        if shard.adds_partial_sums:
            (span,) = spans
            adds_bias = has_bias and shard.rank == 0  # once in a sum
            return SummedOutput(self._linear(name, width, slice(None), span, adds_bias), self._collectives)
        parts = [self._linear(name, width, part.even(hidden_size), slice(None), has_bias) for part in shard.parts]
        return parts[0] if shard.is_whole else OrderedOutput(tuple(parts), self._collectives)

    def _linear(self, name: str, width: int, rows: slice, columns: slice, has_bias: bool) -> PackedLinear:
        hidden_size = self._config.hidden_size
        weight = self._weights.tensor(f"{name}.weight", (hidden_size, width), rows=rows, columns=columns)
        bias = self._weights.tensor(f"{name}.bias", (hidden_size,), rows=rows) if has_bias else None
        return PackedLinear(weight, bias, kernels=self._kernels)

    def _query_key_norm(self, prefix: str, num_heads: int, num_kv_heads: int) -> Tensor | None:
        if not self._config.query_key_norm:
            return None
        query_norm, key_norm = (
            self._weights.tensor(f"{prefix}.{name}.weight", (self._config.head_dim,)) for name in ("q_norm", "k_norm")
        )
        return repeat_norm_weights(query_norm, key_norm, num_heads, num_kv_heads)


def _times(part: slice, width: int) -> slice:
    """Returns a part of heads as a part of rows."""
    return slice(part.start * width, part.stop * width)
