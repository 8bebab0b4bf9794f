"""Every tensor that a model needs, by name and shape: what the router checks before any node loads. No torch.

The shapes are those of `services/stage/loading.py` and `services/expert/shard_store.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from common.checkpoint import StoredTensor
from common.errors import CheckpointError
from common.model_config import ModelConfig

STORED_DTYPES = ("F32", "BF16", "F16")


def check_tensors(config: ModelConfig, index: Mapping[str, StoredTensor]) -> None:
    """Raises CheckpointError that names the first tensor that is missing, misshapen or of a dtype not known here."""
    for name, shape in expected_tensors(config, index):
        stored = index.get(name)
        if stored is None:
            raise CheckpointError(f"tensor {name} is missing in the checkpoint")
        if stored.shape != shape:
            raise CheckpointError(f"tensor {name} has shape {list(stored.shape)}, config.json asks for {list(shape)}")
        if stored.dtype not in STORED_DTYPES:
            raise CheckpointError(f"tensor {name} is stored as {stored.dtype}; known are {', '.join(STORED_DTYPES)}")


def expected_tensors(config: ModelConfig, index: Mapping[str, StoredTensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes; `index` tells which of two forms a checkpoint has (experts one by one, or fused)."""
    hidden = config.hidden_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for layer, is_moe in enumerate(config.moe_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield from _attention(config, f"{prefix}.self_attn")
        yield from _experts(config, prefix, index) if is_moe else _dense(config, f"{prefix}.mlp")


def _attention(config: ModelConfig, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = {
        "q_proj": (query_rows, config.hidden_size),
        "k_proj": (kv_rows, config.hidden_size),
        "v_proj": (kv_rows, config.hidden_size),
        "o_proj": (config.hidden_size, query_rows),
    }
    for name, shape in projections.items():
        yield f"{prefix}.{name}.weight", shape
        if config.attention_bias:
            yield f"{prefix}.{name}.bias", shape[:1]
    if config.query_key_norm:
        yield f"{prefix}.q_norm.weight", (config.head_dim,)
        yield f"{prefix}.k_norm.weight", (config.head_dim,)


def _dense(config: ModelConfig, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, hidden = config.dense_intermediate_size, config.hidden_size
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _experts(
    config: ModelConfig, prefix: str, index: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    names, width, hidden = config.expert_names, config.expert_intermediate_size, config.hidden_size
    router = f"{prefix}.{names.router}"
    yield (router if router in index else f"{prefix}.mlp.gate.weight"), (config.num_experts, hidden)
    first_gate = f"{prefix}.{names.gate.format(expert=0)}"
    if first_gate not in index and f"{prefix}.{names.fused_gate_up}" in index:
        yield f"{prefix}.{names.fused_gate_up}", (config.num_experts, 2 * width, hidden)
        yield f"{prefix}.{names.fused_down}", (config.num_experts, hidden, width)
        return
    for expert in range(config.num_experts):
        yield f"{prefix}.{names.gate.format(expert=expert)}", (width, hidden)
        yield f"{prefix}.{names.up.format(expert=expert)}", (width, hidden)
        yield f"{prefix}.{names.down.format(expert=expert)}", (hidden, width)
