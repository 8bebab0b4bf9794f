"""Every tensor that a model or a part of it needs, by name and shape: it is checked before anything loads. No torch.

The shapes are those of `services/stage/model/loading.py` and `services/expert/shard_store.py`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

from common.checkpoint.directory import StoredTensor
from common.checkpoint.model_config import ModelConfig
from common.errors import CheckpointError
from common.topology import CheckpointPart, LayerRange

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
STORED_DTYPES = ("F32", "BF16", "F16")
_DECODER = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
_MADE_ANEW = (".rotary_emb.inv_freq",)
"""Old checkpoints store this table, which follows from the config."""
NamedShapes = Iterator[tuple[str, tuple[int, ...]]]


def check_tensors(
    config: ModelConfig,
    index: Mapping[str, StoredTensor],
    part: CheckpointPart | None = None,
    where: str = "the checkpoint",
) -> None:
    """Raises CheckpointError that names the first tensor that is missing, misshapen or of a dtype not known here."""
    for name, shape in expected_tensors(config, index, part):
        find_tensor(index, name, shape, where)


def find_tensor(index: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...], where: str) -> StoredTensor:
    """Returns where a tensor is. Raises CheckpointError as `check_tensors` does."""
    stored = index.get(name)
    if stored is None:
        raise CheckpointError(f"tensor {name} is missing in {where}")
    if stored.shape != shape:
        raise CheckpointError(f"tensor {name} has shape {list(stored.shape)}, config.json asks for {list(shape)}")
    if stored.dtype not in STORED_DTYPES:
        raise CheckpointError(f"tensor {name} is stored as {stored.dtype}; supported are F32, BF16 and F16")
    return stored


def unused_tensors(config: ModelConfig, index: Mapping[str, StoredTensor]) -> list[str]:
    """Names in a whole checkpoint that nothing here reads, in order: a value head, a projector, tables that are made
    anew. transformers passes over them and says so.

    Raises CheckpointError for one inside the decoder: the config denies it, and what stored it computes with it.
    """
    expected = {name for name, _ in expected_tensors(config, index)}
    unused = sorted(index.keys() - expected)
    for name in unused:
        if name.startswith(_DECODER) and not name.endswith(_MADE_ANEW):
            raise CheckpointError(
                f"tensor {name} is in the checkpoint, but by config.json the model has none of that name: "
                f"{_contradiction(config, name)}"
            )
    return unused


def embedding_name(config: ModelConfig, index: Container[str]) -> str:
    """Returns the tensor that makes hidden states of tokens. Of a tied pair it is the one that is there."""
    return LM_HEAD if config.tie_word_embeddings and EMBEDDING not in index and LM_HEAD in index else EMBEDDING


def lm_head_name(config: ModelConfig, index: Container[str]) -> str:
    """Returns the tensor that makes logits of hidden states: a stored one counts, whatever the config says of tying.

    transformers ties only where the two do not differ, and then it makes no difference which of them is read.
    """
    return EMBEDDING if config.tie_word_embeddings and LM_HEAD not in index else LM_HEAD


def expected_tensors(
    config: ModelConfig, index: Mapping[str, StoredTensor], part: CheckpointPart | None = None
) -> NamedShapes:
    """Names and shapes of a part, or of everything; `index` tells which forms a checkpoint has (experts one by one, or
    fused)."""
    part = part or CheckpointPart(LayerRange(0, config.num_layers), frozenset(range(config.num_experts)))
    if part.layers is not None:
        yield from stage_tensors(config, index, part.layers)
    experts = sorted(part.experts)
    for layer in config.moe_layer_indices if experts else ():
        if is_fused(config, index, layer, experts[0]):
            yield from fused_expert_tensors(config, layer)
        else:
            yield from expert_tensors(config, layer, experts)


def stage_tensors(config: ModelConfig, index: Container[str], layers: LayerRange) -> NamedShapes:
    """Returns what the stages that hold these layers need: all but experts. With the first layer goes the embedding,
    with the last one what makes logits of hidden states."""
    hidden, vocabulary = config.hidden_size, (config.vocab_size, config.hidden_size)
    is_first, is_last = layers.start == 0, layers.stop == config.num_layers
    ends = [embedding_name(config, index)] if is_first else []
    ends += [lm_head_name(config, index)] if is_last else []
    for name in dict.fromkeys(ends):
        yield name, vocabulary
    if is_last:
        yield "model.norm.weight", (hidden,)
    for layer in range(layers.start, layers.stop):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield from _attention(config, f"{prefix}.self_attn")
        if config.moe_layers[layer]:
            router = f"{prefix}.{config.expert_names.router}"
            yield (router if router in index else f"{prefix}.mlp.gate.weight"), (config.num_experts, hidden)
        else:
            yield from _dense(config, f"{prefix}.mlp")


def expert_tensors(config: ModelConfig, layer: int, experts: Iterable[int]) -> NamedShapes:
    """Returns those of experts that are stored one by one: gate, up and down of each."""
    names, width, hidden = config.expert_names, config.expert_intermediate_size, config.hidden_size
    for expert in experts:
        yield f"model.layers.{layer}.{names.gate.format(expert=expert)}", (width, hidden)
        yield f"model.layers.{layer}.{names.up.format(expert=expert)}", (width, hidden)
        yield f"model.layers.{layer}.{names.down.format(expert=expert)}", (hidden, width)


def fused_expert_tensors(config: ModelConfig, layer: int) -> NamedShapes:
    """Returns those of a layer whose experts are stored as one: gate rows before up rows, and down."""
    names, width, hidden = config.expert_names, config.expert_intermediate_size, config.hidden_size
    yield f"model.layers.{layer}.{names.fused_gate_up}", (config.num_experts, 2 * width, hidden)
    yield f"model.layers.{layer}.{names.fused_down}", (config.num_experts, hidden, width)


def is_fused(config: ModelConfig, index: Mapping[str, StoredTensor], layer: int, expert: int) -> bool:
    """Returns whether a layer's experts, of which this is one, are stored as one."""
    names, prefix = config.expert_names, f"model.layers.{layer}"
    is_alone = f"{prefix}.{names.gate.format(expert=expert)}" in index
    return not is_alone and f"{prefix}.{names.fused_gate_up}" in index


def _attention(config: ModelConfig, prefix: str) -> NamedShapes:
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


def _dense(config: ModelConfig, prefix: str) -> NamedShapes:
    width, hidden = config.dense_intermediate_size, config.hidden_size
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _contradiction(config: ModelConfig, name: str) -> str:
    parts = name.split(".")
    if parts[1] == "layers" and parts[2].isdecimal() and int(parts[2]) >= config.num_layers:
        return f"num_hidden_layers is {config.num_layers}"
    if "experts" in parts and any(part.isdecimal() and int(part) >= config.num_experts for part in parts[4:]):
        return f"the number of experts is {config.num_experts}"
    if parts[-1] == "bias":
        return "it asks for no such bias" + (" (attention_bias)" if "self_attn" in parts else "")
    return f"model_type {config.model_type!r} does not compute with it"
