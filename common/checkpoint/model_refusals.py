"""What a `config.json` may ask for that changes the numbers and is not computed here: refused by name.

transformers ignores some of these for a family that does not have them. A checkpoint that carries one all the same was
made for other code than transformers', and would be computed wrongly without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from common.checkpoint.config_values import items, shown
from common.errors import UnsupportedModelError

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


def refuse_unsupported_features(raw: Mapping[str, Any], sliding_window: int | None) -> None:
    """What no family has here. Raises UnsupportedModelError that names the key."""
    for key, feature in _FEATURES.items():
        if raw.get(key):
            raise UnsupportedModelError(f"config.json: {key} asks for {feature}, which is not supported")
    for key in _FACTORS:
        if raw.get(key) not in (None, 1):
            raise UnsupportedModelError(f"config.json: {key} {shown(raw[key])} is not supported; supported is 1")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
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


def refuse_attention_bias(raw: Mapping[str, Any], model_type: str) -> None:
    """For a family whose attention has no biases."""
    if raw.get("attention_bias"):
        raise UnsupportedModelError(f"config.json: attention_bias is not supported with model_type {model_type!r}")


def refuse_dense_layers(raw: Mapping[str, Any], model_type: str) -> None:
    """For a family in which every layer has experts."""
    for key, neutral in (("mlp_only_layers", ([], None)), ("decoder_sparse_step", (1, None))):
        if raw.get(key) not in neutral:
            raise UnsupportedModelError(
                f"config.json: {key} {shown(raw[key])} is not supported with model_type {model_type!r}: "
                "all of its layers have experts"
            )
