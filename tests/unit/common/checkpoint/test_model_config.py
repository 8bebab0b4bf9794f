"""config.json: read as transformers reads it, or refused with a sentence that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig, Qwen3MoeConfig

from common.checkpoint.model_config import parse_model_config, read_model_config
from common.errors import CheckpointError, UnsupportedModelError

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
}
MIXTRAL: dict[str, Any] = SMALL | {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 48}
QWEN3: dict[str, Any] = SMALL | {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "moe_intermediate_size": 40,
    "intermediate_size": 80,
}
FAMILIES = pytest.mark.parametrize("base", [MIXTRAL, QWEN3], ids=["mixtral", "qwen3_moe"])


def saved(config: Any, directory: Path) -> dict[str, Any]:
    """As transformers writes it."""
    config.save_pretrained(directory)
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-4},
        {"num_key_value_heads": 8},
        {"num_local_experts": 12},
        {"sliding_window": 32},
        {"head_dim": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
    ids=str,
)
def test_mixtral_as_transformers_writes_it(options: dict[str, Any], tmp_path: Path) -> None:
    config: Any = MixtralConfig(**(MIXTRAL | options))
    read = parse_model_config(saved(config, tmp_path))
    assert read == read_model_config(tmp_path)
    assert read.num_layers == config.num_hidden_layers
    assert read.num_experts == config.num_local_experts
    assert read.num_kv_heads == config.num_key_value_heads
    assert read.head_dim == (config.head_dim or config.hidden_size // config.num_attention_heads)
    assert read.expert_intermediate_size == config.intermediate_size
    assert read.sliding_window == config.sliding_window
    assert read.tie_word_embeddings == config.tie_word_embeddings
    assert read.rms_norm_eps == config.rms_norm_eps
    assert read.rope.theta == config.rope_parameters["rope_theta"]
    assert read.moe_layers == (True,) * 6
    assert read.normalize_expert_weights
    assert not read.query_key_norm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_topk_prob": True, "attention_bias": True},
        {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
        {"mlp_only_layers": [0, 5]},
        {"use_sliding_window": True, "sliding_window": 32},
        {"sliding_window": 32},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": None},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ],
    ids=str,
)
def test_qwen3_moe_as_transformers_writes_it(options: dict[str, Any], tmp_path: Path) -> None:
    config: Any = Qwen3MoeConfig(**(QWEN3 | options))
    read = parse_model_config(saved(config, tmp_path))
    assert read.num_experts == config.num_experts
    assert read.expert_intermediate_size == config.moe_intermediate_size
    assert read.dense_intermediate_size == config.intermediate_size
    assert read.sliding_window == config.sliding_window
    assert read.attention_bias == config.attention_bias
    assert read.normalize_expert_weights == config.norm_topk_prob
    assert read.moe_layers == tuple(
        layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0 for layer in range(6)
    )
    assert read.moe_layer_indices == tuple(i for i, is_moe in enumerate(read.moe_layers) if is_moe)
    assert read.query_key_norm


@pytest.mark.parametrize(
    "key",
    [
        "num_key_value_heads",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "norm_topk_prob",
        "attention_bias",
        "use_sliding_window",
        "decoder_sparse_step",
        "mlp_only_layers",
        "rope_parameters",
        "head_dim",
    ],
)
@pytest.mark.parametrize(("base", "config_class"), [(MIXTRAL, MixtralConfig), (QWEN3, Qwen3MoeConfig)])
def test_what_a_config_leaves_unsaid_is_as_transformers_fills_it_in(base: Any, config_class: Any, key: str) -> None:
    raw = {name: value for name, value in base.items() if name != key}
    config = config_class.from_dict(raw)
    read = parse_model_config(raw)
    assert read.num_kv_heads == config.num_key_value_heads
    assert read.rms_norm_eps == config.rms_norm_eps
    assert read.tie_word_embeddings == config.tie_word_embeddings
    assert read.sliding_window == config.sliding_window
    assert read.attention_bias == getattr(config, "attention_bias", False)
    assert read.rope.theta == config.rope_parameters["rope_theta"]
    assert read.head_dim == (getattr(config, "head_dim", None) or 64 // 8)


@pytest.mark.parametrize("key", ["rms_norm_eps", "hidden_act", "num_local_experts", "dtype", "rope_theta"])
@pytest.mark.parametrize("base", [MIXTRAL, QWEN3])
def test_null_counts_as_absent(base: dict[str, Any], key: str) -> None:
    without = {name: value for name, value in base.items() if name != key}
    if key == "num_local_experts":
        without |= {"num_experts": 6}
    assert parse_model_config(without | {key: None}) == parse_model_config(without)


def test_a_window_that_is_switched_on_and_left_unsaid_is_the_familys_own() -> None:
    raw = QWEN3 | {"use_sliding_window": True}
    assert parse_model_config(raw).sliding_window == Qwen3MoeConfig.from_dict(raw).sliding_window == 4096


def test_either_name_of_the_number_of_experts_is_read_and_two_numbers_are_refused() -> None:
    without = {key: value for key, value in QWEN3.items() if key != "num_experts"}
    assert parse_model_config(without | {"num_local_experts": 6}).num_experts == 6
    assert parse_model_config(QWEN3 | {"num_local_experts": 6}).num_experts == 6
    with pytest.raises(CheckpointError, match="num_local_experts and num_experts differ"):
        parse_model_config(QWEN3 | {"num_local_experts": 8})


@FAMILIES
@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model_type", "llama", "model_type 'llama'"),
        ("model_type", None, "model_type None"),
        ("model_type", ["mixtral"], "model_type"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        ("compression_config", {"bits": 4}, "compression_config"),
        ("vision_config", {"depth": 2}, "vision_config"),
        ("auto_map", {"AutoModelForCausalLM": "x.Y"}, "auto_map"),
        ("per_layer_config", {"0": {"hidden_size": 32}}, "per_layer_config"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
        ("clip_qkv", 8.0, "clip_qkv"),
        ("n_shared_experts", 1, "n_shared_experts"),
        ("shared_expert_intermediate_size", 64, "shared_expert_intermediate_size"),
        ("routed_scaling_factor", 2.5, "routed_scaling_factor"),
        ("logit_scale", 0.5, "logit_scale"),
        ("architectures", ["MixtralForSequenceClassification"], "MixtralForSequenceClassification"),
        ("architectures", ["Qwen3MoeModel"], "Qwen3MoeModel"),
        ("layer_types", ["full_attention", "sliding_attention"] * 3, "layer_types"),
        ("layer_types", ["linear_attention"] * 6, "linear_attention"),
        ("dtype", "float8_e4m3fn", "float8_e4m3fn"),
        ("torch_dtype", "int8", "int8"),
        ("head_dim", 15, "head_dim 15"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ("rope_scaling", {"type": "longrope", "factor": 2.0}, "'longrope'"),
        ("rope_parameters", {"rope_type": "default", "mrope_section": [4, 2, 2]}, "mrope_section"),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}, "layer to layer"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(base: dict[str, Any], key: str, value: Any, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        parse_model_config(base | {key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("attention_bias", True), ("mlp_only_layers", [1]), ("decoder_sparse_step", 2)]
)
def test_mixtral_has_neither_biases_nor_dense_layers(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{key}.*mixtral"):
        parse_model_config(MIXTRAL | {key: value})


def test_a_window_for_some_layers_only_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="max_window_layers"):
        parse_model_config(QWEN3 | {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3})
    assert parse_model_config(QWEN3 | {"max_window_layers": 3}).sliding_window is None


def test_scaling_said_twice_must_be_said_alike() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    assert parse_model_config(MIXTRAL | {"rope_scaling": linear, "rope_parameters": linear}).rope.factor == 2.0
    with pytest.raises(UnsupportedModelError, match="rope_scaling and rope_parameters differ"):
        parse_model_config(MIXTRAL | {"rope_scaling": linear, "rope_parameters": {"rope_theta": 1e6}})


@FAMILIES
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", None),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "6"),
        ("num_attention_heads", 7.0),
        ("num_attention_heads", True),
        ("num_key_value_heads", 3),
        ("vocab_size", None),
        ("max_position_embeddings", None),
        ("num_experts_per_tok", 7),
        ("num_experts_per_tok", 0),
        ("intermediate_size", 0),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "false"),
        ("rope_theta", "10000"),
        ("rope_theta", float("inf")),
        ("rope_theta", 1),
        ("rope_theta", 1e-300),
        ("rope_scaling", "yarn"),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e308}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_slow": 1e-320}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 1e-300}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1e308}),
        ("rope_scaling", {"rope_type": "linear", "factor": 1e-300}),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_by_its_name(base: dict[str, Any], key: str, value: Any) -> None:
    if base is QWEN3 and key == "intermediate_size":
        key = "moe_intermediate_size"
    named = key
    if isinstance(value, dict):
        named = {"linear": "factor", "llama3": "high_freq_factor"}.get(value["rope_type"], list(value)[-1])
    with pytest.raises(CheckpointError, match=named):
        parse_model_config(base | {key: value})


@pytest.mark.parametrize("value", ["yes", 1, [0, "1"], {"0": 1}])
def test_dense_layers_are_a_list_of_numbers(value: Any) -> None:
    with pytest.raises(CheckpointError, match="mlp_only_layers"):
        parse_model_config(QWEN3 | {"mlp_only_layers": value})


@FAMILIES
def test_what_matters_in_training_only_is_no_reason_to_refuse(base: dict[str, Any]) -> None:
    training = {
        "attention_dropout": 0.1,
        "router_jitter_noise": 0.1,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": True,
        "initializer_range": 0.5,
        "use_cache": False,
        "transformers_version": "4.51.0",
        "architectures": ["AnyForCausalLM"],
        "layer_types": ["full_attention"] * 6,
        "quantization_config": None,
        "routed_scaling_factor": 1.0,
    }
    assert parse_model_config(base | training) == parse_model_config(base)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\ufeff{}"])
def test_a_damaged_config_is_refused_with_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_model_config(tmp_path)


def test_parameters_are_counted_from_the_shapes() -> None:
    config = parse_model_config(QWEN3 | {"mlp_only_layers": [2]})
    attention = 64 * 16 * (8 + 2 + 2 + 8) + 2 * 64
    assert config.attention_parameters() == attention
    assert config.layer_parameters_on_stage(0) == attention + 6 * 64
    assert config.layer_parameters_on_stage(2) == attention + 3 * 64 * 80
    assert config.expert_parameters() == 3 * 64 * 40
    assert config.embedding_parameters() == 100 * 64
    assert config.kv_values_per_token() == 2 * 2 * 16
