"""From a checkpoint to one stage's weights: the names and shapes that a layer range needs, and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from common.compute.gated_ffn import GatedExpert
from common.compute.linear import PackedLinear
from common.compute.native_library import NativeKernels
from common.model_config import ModelConfig
from common.topology import StageRole
from common.weights import CheckpointWeights
from services.stage.model.attention import Attention, repeat_norm_weights
from services.stage.model.decoder import DecoderLayer, StageModel
from services.stage.model.gate import Gate
from services.stage.model.rope import RotaryTable


def load_stage(
    weights: CheckpointWeights,
    config: ModelConfig,
    role: StageRole,
    num_positions: int,
    kernels: NativeKernels | None,
) -> StageModel:
    """Load what a role needs. Raises CheckpointError for a tensor that is missing or has another shape."""
    loader = _Loader(weights, config, kernels)
    layers = tuple(loader.layer(index) for index in range(role.layers.start, role.layers.stop))
    vocabulary_shape = (config.vocab_size, config.hidden_size)
    lm_head = final_norm = None
    if role.is_last:
        head_name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        lm_head = PackedLinear(weights.tensor(head_name, vocabulary_shape), kernels=kernels)
        final_norm = weights.tensor("model.norm.weight", (config.hidden_size,))
    return StageModel(
        layers=layers,
        rotary=RotaryTable(config.rope, config.head_dim, num_positions, weights.dtype),
        rms_norm_eps=config.rms_norm_eps,
        embedding=weights.tensor("model.embed_tokens.weight", vocabulary_shape) if role.is_first else None,
        final_norm=final_norm,
        lm_head=lm_head,
        kernels=kernels,
    )


class _Loader:
    def __init__(self, weights: CheckpointWeights, config: ModelConfig, kernels: NativeKernels | None) -> None:
        self._weights = weights
        self._config = config
        self._kernels = kernels

    def layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        width = (self._config.hidden_size,)
        return DecoderLayer(
            index=index,
            input_norm=self._weights.tensor(f"{prefix}.input_layernorm.weight", width),
            attention=self._attention(f"{prefix}.self_attn"),
            post_attention_norm=self._weights.tensor(f"{prefix}.post_attention_layernorm.weight", width),
            feed_forward=self._gate(prefix) if self._config.moe_layers[index] else self._dense(f"{prefix}.mlp"),
        )

    def _attention(self, prefix: str) -> Attention:
        config = self._config
        query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = [
            self._weights.tensor(f"{prefix}.{name}.weight", (rows, config.hidden_size))
            for name, rows in (("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        ]
        qkv_bias = output_bias = None
        if config.attention_bias:
            qkv_bias = torch.cat(
                [
                    self._weights.tensor(f"{prefix}.{name}.bias", (rows,))
                    for name, rows in (("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
                ]
            )
            output_bias = self._weights.tensor(f"{prefix}.o_proj.bias", (config.hidden_size,))
        output = self._weights.tensor(f"{prefix}.o_proj.weight", (config.hidden_size, query_rows))
        return Attention(
            qkv=PackedLinear(torch.cat(qkv), qkv_bias, kernels=self._kernels),
            output=PackedLinear(output, output_bias, kernels=self._kernels),
            query_key_norm=self._query_key_norm(prefix),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            sliding_window=config.sliding_window,
            kernels=self._kernels,
        )

    def _query_key_norm(self, prefix: str) -> Tensor | None:
        config = self._config
        if not config.query_key_norm:
            return None
        query_norm, key_norm = (
            self._weights.tensor(f"{prefix}.{name}.weight", (config.head_dim,)) for name in ("q_norm", "k_norm")
        )
        return repeat_norm_weights(query_norm, key_norm, config.num_heads, config.num_kv_heads)

    def _gate(self, prefix: str) -> Gate:
        config = self._config
        shape = (config.num_experts, config.hidden_size)
        weight = self._weights.tensor(f"{prefix}.{self._router_name(prefix)}", shape)
        return Gate(
            PackedLinear(weight, kernels=self._kernels),
            config.num_experts_per_token,
            normalize=config.normalize_expert_weights,
            round_weights=not config.gate_weights_in_float32,
        )

    def _router_name(self, prefix: str) -> str:
        """Newer Mixtral files name the gate as Qwen3-MoE does."""
        name = self._config.expert_names.router
        return name if f"{prefix}.{name}" in self._weights else "mlp.gate.weight"

    def _dense(self, prefix: str) -> GatedExpert:
        config = self._config
        inner, outer = (config.dense_intermediate_size, config.hidden_size), config.hidden_size
        return GatedExpert(
            self._weights.tensor(f"{prefix}.gate_proj.weight", inner),
            self._weights.tensor(f"{prefix}.up_proj.weight", inner),
            self._weights.tensor(f"{prefix}.down_proj.weight", (outer, config.dense_intermediate_size)),
            kernels=self._kernels,
        )
