"""The tensors of a layer range that are cut over ranks, read as one rank has them: no byte of another rank's.

A rank may have several parts of the layers (services/stage/model/joined_parts.py); each is read by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.checkpoint.model_config import ModelConfig
from common.checkpoint.tensor_names import embedding_name, lm_head_name
from common.checkpoint.weights import CheckpointWeights
from common.compute.gated_ffn import GatedExpert
from common.compute.linear import PackedLinear
from common.compute.native_library import NativeKernels
from services.stage.model.attention import Attention, repeat_norm_weights
from services.stage.model.dense_part import DensePart
from services.stage.model.embedding import Embedding
from services.stage.model.gate import Gate
from services.stage.model.joined_parts import (
    AttentionPart,
    DenseColumns,
    join_attention,
    join_columns,
    join_dense,
)
from services.stage.model.tp_shard import RankCut

WHOLE = RankCut()


class PartLoader:
    """Raises CheckpointError for a tensor that is missing or has another shape than config.json says."""

    def __init__(
        self, weights: CheckpointWeights, config: ModelConfig, kernels: NativeKernels | None, cut: RankCut = WHOLE
    ) -> None:
        self._weights = weights
        self._config = config
        self._kernels = kernels
        self._cut = cut

    def attention(self, layer: int) -> AttentionPart:
        """Projections of this rank's heads; output columns, or in `fast` what its heads add to all of them."""
        cuts = self._cut.parts
        kv_heads = [cut.kv_heads(self._config.num_kv_heads) for cut in cuts]
        return join_attention([self._attention(layer, cut) for cut in cuts], kv_heads)

    def _attention(self, layer: int, cut: RankCut) -> Attention:
        config, prefix = self._config, f"model.layers.{layer}.self_attn"
        width = config.head_dim
        heads, kv_heads = cut.even(config.num_heads), cut.kv_heads(config.num_kv_heads)
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
        return Attention(
            qkv=PackedLinear(torch.cat(qkv), qkv_bias, kernels=self._kernels),
            output=self._second(
                f"{prefix}.o_proj", cut, config.num_heads * width, _times(heads, width), has_bias=config.attention_bias
            ),
            query_key_norm=self._query_key_norm(prefix, num_heads, num_kv_heads),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=width,
            rms_norm_eps=config.rms_norm_eps,
            sliding_window=config.sliding_window,
            kernels=self._kernels,
        )

    def dense(self, layer: int) -> GatedExpert | DenseColumns:
        """A feed-forward network without experts: whole, or this rank's columns of its linears."""
        if self._cut.is_whole:
            gate, up = self._gate_and_up(layer, self._cut)
            shape = (self._config.hidden_size, self._config.dense_intermediate_size)
            down = self._weights.tensor(f"model.layers.{layer}.mlp.down_proj.weight", shape)
            return GatedExpert(gate, up, down, kernels=self._kernels)
        return join_dense([self._dense(layer, cut) for cut in self._cut.parts])

    def _dense(self, layer: int, cut: RankCut) -> DensePart:
        gate, up = self._gate_and_up(layer, cut)
        width = self._config.dense_intermediate_size
        return DensePart(
            PackedLinear(gate, kernels=self._kernels),
            PackedLinear(up, kernels=self._kernels),
            self._second(f"model.layers.{layer}.mlp.down_proj", cut, width, cut.even(width), has_bias=False),
            self._kernels,
        )

    def _gate_and_up(self, layer: int, cut: RankCut) -> list[Tensor]:
        shape = (self._config.dense_intermediate_size, self._config.hidden_size)
        own = cut.even(shape[0])
        names = (f"model.layers.{layer}.mlp.{name}.weight" for name in ("gate_proj", "up_proj"))
        return [self._weights.tensor(name, shape, rows=own) for name in names]

    def gate(self, layer: int) -> Gate:
        """Which experts a token goes to: computed by the first rank alone."""
        config, prefix = self._config, f"model.layers.{layer}"
        shape = (config.num_experts, config.hidden_size)
        # Newer Mixtral files name the gate as Qwen3-MoE does.
        name = config.expert_names.router
        name = name if f"{prefix}.{name}" in self._weights else "mlp.gate.weight"
        return Gate(
            PackedLinear(self._weights.tensor(f"{prefix}.{name}", shape), kernels=self._kernels),
            config.num_experts_per_token,
            normalize=config.normalize_expert_weights,
            round_weights=not config.gate_weights_in_float32,
        )

    def embedding(self) -> Embedding:
        """This rank's columns of it."""
        config = self._config
        shape = (config.vocab_size, config.hidden_size)
        own = self._cut.even(config.hidden_size)
        return Embedding(self._weights.tensor(embedding_name(config, self._weights), shape, columns=own))

    def lm_head(self) -> Callable[[Tensor], Tensor]:
        """This rank's tokens of the vocabulary. All parts have one size, so the last ones may end in rows of 0."""
        parts: list[Callable[[Tensor], Tensor]] = [self._lm_head(cut) for cut in self._cut.parts]
        return join_columns(parts, self._config.vocab_size if self._cut.degree == 1 else None)

    def _lm_head(self, cut: RankCut) -> PackedLinear:
        config = self._config
        name = lm_head_name(config, self._weights)
        own = cut.padded(config.vocab_size)
        rows = slice(min(own.start, config.vocab_size), min(own.stop, config.vocab_size))
        weight = self._weights.tensor(name, (config.vocab_size, config.hidden_size), rows=rows)
        lacking = own.stop - own.start - weight.shape[0]
        if lacking:
            weight = torch.cat((weight, weight.new_zeros((lacking, config.hidden_size))))
        return PackedLinear(weight, kernels=self._kernels)

    def _second(self, name: str, cut: RankCut, width: int, own: slice, *, has_bias: bool) -> PackedLinear:
        """The linear that ends a half of a layer, [D, width]: output columns, or in `fast` its input's `own` part."""
        config = self._config
        columns = own if cut.adds_partial_sums else slice(None)
        rows = slice(None) if cut.adds_partial_sums else cut.even(config.hidden_size)
        weight = self._weights.tensor(f"{name}.weight", (config.hidden_size, width), rows=rows, columns=columns)
        bias = None
        if has_bias and (cut.rank == 0 or not cut.adds_partial_sums):  # once in a sum
            bias = self._weights.tensor(f"{name}.bias", (config.hidden_size,), rows=rows)
        return PackedLinear(weight, bias, kernels=self._kernels)

    def _query_key_norm(self, prefix: str, num_heads: int, num_kv_heads: int) -> Tensor | None:
        if not self._config.query_key_norm:
            return None
        query_norm, key_norm = (
            self._weights.tensor(f"{prefix}.{name}.weight", (self._config.head_dim,)) for name in ("q_norm", "k_norm")
        )
        return repeat_norm_weights(query_norm, key_norm, num_heads, num_kv_heads)


def _times(part: slice, width: int) -> slice:
    """A part of heads as a part of rows."""
    return slice(part.start * width, part.stop * width)
