"""Sizes of a model, read from a Hugging Face `config.json`: one description of a decoder, not one class per family.

A family is a row of `_FAMILIES`: what its config calls things and what it fixes. Whatever a config asks for and this
build does not compute is refused here with a sentence that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.checkpoint.config_values import flag, items, shown, whole_number
from common.checkpoint.directory import read_json
from common.checkpoint.rope_config import RopeConfig, read_rope_config
from common.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class ExpertTensorNames:
    """Names below `model.layers.N.`; `{expert}` stands for the expert's number."""

    router: str
    gate: str
    up: str
    down: str
    fused_gate_up: str
    """One tensor [E, 2F, D] for all experts of a layer, as newer checkpoints may store it."""
    fused_down: str
    """[E, D, F]."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only Mixture-of-Experts model. L layers, D width, H heads, N head width, E experts, K a token."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int
    num_experts_per_token: int
    expert_intermediate_size: int
    dense_intermediate_size: int
    """Width of the FFN of layers that are not MoE layers (unused where all are)."""
    moe_layers: tuple[bool, ...]
    """[L]: which layers have experts."""
    normalize_expert_weights: bool
    """Divide the K gate weights of a token by their sum."""
    gate_weights_in_float32: bool
    """Mixtral keeps gate weights in float32; Qwen3-MoE rounds them to the model's dtype."""
    rms_norm_eps: float
    attention_bias: bool
    query_key_norm: bool
    sliding_window: int | None
    """How many of the last positions are attended to; None: all."""
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeConfig
    dtype: str
    """What the checkpoint is stored in, by its own word: `float32`, `bfloat16` or `float16`."""
    expert_names: ExpertTensorNames

    def __post_init__(self) -> None:
        """Raises CheckpointError for sizes that do not go together, UnsupportedModelError for an odd head width."""
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(
                f"config.json: head_dim {self.head_dim} is odd; rotary embedding needs an even one"
            )
        if self.num_experts_per_token > self.num_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {self.num_experts_per_token} is more than the {self.num_experts} "
                "experts"
            )

    @property
    def context_tokens(self) -> int:
        """Returns the longest sequence that the model is made for: `max_position_embeddings`, or more by its rope
        scaling."""
        return self.rope.context_tokens(self.max_position_embeddings)

    @property
    def moe_layer_indices(self) -> tuple[int, ...]:
        """Layers that call experts, ascending."""
        return tuple(layer for layer, is_moe in enumerate(self.moe_layers) if is_moe)

    def attention_parameters(self) -> int:
        """Returns the number of weights of one layer's attention and norms."""
        projections = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return projections + 2 * self.hidden_size

    def layer_parameters_on_stage(self, layer: int) -> int:
        """Returns the number of weights of one layer that live on a stage: all but the experts."""
        if self.moe_layers[layer]:
            return self.attention_parameters() + self.num_experts * self.hidden_size
        return self.attention_parameters() + 3 * self.hidden_size * self.dense_intermediate_size

    def expert_parameters(self) -> int:
        """Returns the number of weights of one expert of one layer."""
        return 3 * self.hidden_size * self.expert_intermediate_size

    def embedding_parameters(self) -> int:
        """Returns the number of weights of the embedding, or of an untied lm_head."""
        return self.vocab_size * self.hidden_size

    def kv_values_per_token(self) -> int:
        """Returns how many K and V numbers one layer keeps for one token."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class _Family:
    """What a model family calls things, and what it leaves unsaid (as transformers' config class fills it in)."""

    expert_intermediate_key: str
    default_num_kv_heads: int
    has_attention_bias: bool
    """Reads `attention_bias`."""
    has_dense_layers: bool
    """Reads `decoder_sparse_step` and `mlp_only_layers`."""
    query_key_norm: bool
    always_normalizes: bool
    gate_weights_in_float32: bool
    default_rms_norm_eps: float
    default_rope_theta: float
    sliding_window_needs_flag: bool
    default_sliding_window: int | None
    names: ExpertTensorNames


_FAMILIES: dict[str, _Family] = {
    "mixtral": _Family(
        expert_intermediate_key="intermediate_size",
        default_num_kv_heads=8,
        has_attention_bias=False,
        has_dense_layers=False,
        query_key_norm=False,
        always_normalizes=True,
        gate_weights_in_float32=True,
        default_rms_norm_eps=1e-5,
        default_rope_theta=1_000_000.0,
        sliding_window_needs_flag=False,
        default_sliding_window=None,
        names=ExpertTensorNames(
            router="block_sparse_moe.gate.weight",
            gate="block_sparse_moe.experts.{expert}.w1.weight",
            up="block_sparse_moe.experts.{expert}.w3.weight",
            down="block_sparse_moe.experts.{expert}.w2.weight",
            fused_gate_up="mlp.experts.gate_up_proj",
            fused_down="mlp.experts.down_proj",
        ),
    ),
    "qwen3_moe": _Family(
        expert_intermediate_key="moe_intermediate_size",
        default_num_kv_heads=4,
        has_attention_bias=True,
        has_dense_layers=True,
        query_key_norm=True,
        always_normalizes=False,
        gate_weights_in_float32=False,
        default_rms_norm_eps=1e-6,
        default_rope_theta=10_000.0,
        sliding_window_needs_flag=True,
        default_sliding_window=4096,
        names=ExpertTensorNames(
            router="mlp.gate.weight",
            gate="mlp.experts.{expert}.gate_proj.weight",
            up="mlp.experts.{expert}.up_proj.weight",
            down="mlp.experts.{expert}.down_proj.weight",
            fused_gate_up="mlp.experts.gate_up_proj",
            fused_down="mlp.experts.down_proj",
        ),
    ),
}


def read_model_config(directory: Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint directory.

    Raises CheckpointError (missing, damaged, a size that makes no sense) or UnsupportedModelError (names the feature).
    """
    path = directory / "config.json"
    return parse_model_config(
        read_json(path, f"no config.json in {directory}: MODEL must be a Hugging Face checkpoint directory")
    )


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the description of the decoder that a parsed `config.json` stands for. Raises as `read_model_config`."""
    model_type, family = _family_of(raw)
    sliding_window = _sliding_window(raw, family)
    _refuse_unsupported_features(raw, sliding_window)
    _refuse_features_of_other_families(raw, model_type, family)
    num_layers = whole_number(raw, "num_hidden_layers")
    hidden_size = whole_number(raw, "hidden_size")
    num_heads = whole_number(raw, "num_attention_heads")
    unsaid_kv_heads = num_heads if "num_key_value_heads" in raw else family.default_num_kv_heads
    max_position_embeddings = whole_number(raw, "max_position_embeddings")
    expert_intermediate_size = whole_number(raw, family.expert_intermediate_key)
    return ModelConfig(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=whole_number(raw, "num_key_value_heads", default=unsaid_kv_heads),
        head_dim=whole_number(raw, "head_dim", default=hidden_size // num_heads),
        vocab_size=whole_number(raw, "vocab_size"),
        num_experts=_num_experts(raw),
        num_experts_per_token=whole_number(raw, "num_experts_per_tok"),
        expert_intermediate_size=expert_intermediate_size,
        dense_intermediate_size=whole_number(raw, "intermediate_size", default=expert_intermediate_size),
        moe_layers=_moe_layers(raw, num_layers),
        normalize_expert_weights=family.always_normalizes or flag(raw, "norm_topk_prob"),
        gate_weights_in_float32=family.gate_weights_in_float32,
        rms_norm_eps=_epsilon(raw, family),
        attention_bias=flag(raw, "attention_bias"),
        query_key_norm=family.query_key_norm,
        sliding_window=sliding_window,
        tie_word_embeddings=flag(raw, "tie_word_embeddings"),
        max_position_embeddings=max_position_embeddings,
        rope=read_rope_config(raw, family.default_rope_theta, max_position_embeddings),
        dtype=_dtype(raw),
        expert_names=family.names,
    )


def _family_of(raw: Mapping[str, Any]) -> tuple[str, _Family]:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise UnsupportedModelError(
            f"config.json: model_type {shown(model_type)} is not supported; "
            f"supported are {', '.join(sorted(_FAMILIES))}"
        )
    return model_type, _FAMILIES[model_type]


def _epsilon(raw: Mapping[str, Any], family: _Family) -> float:
    value = raw.get("rms_norm_eps")
    if value is None:
        value = family.default_rms_norm_eps
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise CheckpointError(f"config.json: rms_norm_eps must be a number from 0 to 1, not {shown(value)}")
    return float(value)


def _num_experts(raw: Mapping[str, Any]) -> int:
    """Reads it by either of its names: transformers knows both in both families."""
    named = {key: whole_number(raw, key) for key in ("num_local_experts", "num_experts") if raw.get(key) is not None}
    if len(set(named.values())) > 1:
        raise CheckpointError(f"config.json: num_local_experts and num_experts differ: {named}")
    return next(iter(named.values())) if named else whole_number(raw, "num_experts")


def _moe_layers(raw: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    step = whole_number(raw, "decoder_sparse_step", default=1)
    dense_layers = raw.get("mlp_only_layers")
    dense_layers = [] if dense_layers is None else dense_layers
    if not isinstance(dense_layers, list) or not all(type(layer) is int for layer in dense_layers):
        raise CheckpointError(
            f"config.json: mlp_only_layers must be a list of layer numbers, not {shown(dense_layers)}"
        )
    return tuple(layer not in dense_layers and (layer + 1) % step == 0 for layer in range(num_layers))


def _sliding_window(raw: Mapping[str, Any], family: _Family) -> int | None:
    if family.sliding_window_needs_flag and not flag(raw, "use_sliding_window"):
        return None
    if raw.get("sliding_window", family.default_sliding_window) is None:
        return None
    return whole_number(raw, "sliding_window", default=family.default_sliding_window)


def _dtype(raw: Mapping[str, Any]) -> str:
    named = (raw.get("dtype"), raw.get("torch_dtype"), "float32")
    value = next(name for name in named if name is not None)
    if value not in ("float32", "bfloat16", "float16"):
        raise UnsupportedModelError(
            f"config.json: dtype {shown(value)} is not supported; supported are float32, bfloat16 and float16"
        )
    return str(value)


_FEATURES: Final = {
    "quantization_config": "quantized weights",
    "compression_config": "quantized weights",
    "vision_config": "an image encoder",
    "audio_config": "an audio encoder",
    "auto_map": "remote code",
    "transformers_weights": "weights in a file of another name",
    "per_layer_config": "layers of different shapes",
    "pruned_heads": "pruned attention heads",
    "attn_logit_softcapping": "capped attention scores",
    "final_logit_softcapping": "capped logits",
    "clip_qkv": "clipped queries, keys and values",
    "qkv_bias": "biases of queries, keys and values alone",
    "mlp_bias": "biases in the feed-forward layers",
    "shared_expert_intermediate_size": "shared experts",
    "num_shared_experts": "shared experts",
    "n_shared_experts": "shared experts",
}
"""Absent, null, false, 0 or empty: not asked for."""

_FACTORS: Final = ("logit_scale", "embedding_multiplier", "residual_multiplier", "routed_scaling_factor")
"""1 or absent: not asked for."""


def _refuse_unsupported_features(raw: Mapping[str, Any], sliding_window: int | None) -> None:
    """Raises UnsupportedModelError for what no family has here, with the key that asks for it.

    transformers ignores some of these keys for a family that does not have them. A checkpoint that carries one all the
    same was made for other code than transformers', and would be computed wrongly without a word.
    """
    for key, feature in _FEATURES.items():
        if raw.get(key):
            raise UnsupportedModelError(f"config.json: {key} asks for {feature}, which is not supported")
    for key in _FACTORS:
        if raw.get(key) not in (None, 1):
            raise UnsupportedModelError(f"config.json: {key} {shown(raw[key])} is not supported; supported is 1")
    activation = raw.get("hidden_act")
    if activation not in (None, "silu", "swish"):
        raise UnsupportedModelError(
            f"config.json: hidden_act {shown(activation)} is not supported; supported is 'silu'"
        )
    architectures = items(raw, "architectures")
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise UnsupportedModelError(
            f"config.json: architectures {shown(architectures)} is not supported; supported is a ...ForCausalLM"
        )
    if sliding_window is not None and raw.get("max_window_layers"):
        # transformers windows all layers, other engines those from this one on.
        raise UnsupportedModelError("config.json: max_window_layers beside a sliding window is not supported")
    attention = "full_attention" if sliding_window is None else "sliding_attention"
    for kind in items(raw, "layer_types"):
        if kind != attention:
            raise UnsupportedModelError(
                f"config.json: layer_types names {shown(kind)}; "
                f"supported is one kind for all layers, here {attention!r}"
            )


def _refuse_features_of_other_families(raw: Mapping[str, Any], model_type: str, family: _Family) -> None:
    """Raises UnsupportedModelError for biases of attention, and for layers without experts, where a family has none."""
    if not family.has_attention_bias and raw.get("attention_bias"):
        raise UnsupportedModelError(f"config.json: attention_bias is not supported with model_type {model_type!r}")
    for key, neutral in (("mlp_only_layers", ([], None)), ("decoder_sparse_step", (1, None))):
        if not family.has_dense_layers and raw.get(key) not in neutral:
            raise UnsupportedModelError(
                f"config.json: {key} {shown(raw[key])} is not supported with model_type {model_type!r}: "
                "all of its layers have experts"
            )
