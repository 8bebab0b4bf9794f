"""Tiny random checkpoints, made by transformers itself in the forms that its users publish."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.support.checkpoints.tokenizers import TokenizerStyle, write_tokenizer


class Family(StrEnum):
    """Model types as `config.json` names them."""

    QWEN3_MOE = "qwen3_moe"
    MIXTRAL = "mixtral"


@dataclass(frozen=True)
class Recipe:
    """One checkpoint: what is the same for both families by name, what is a family's own in `options`."""

    name: str
    family: Family
    layers: int = 5
    experts: int = 6
    experts_per_token: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 16
    width: int = 64
    expert_width: int = 48
    tied: bool = False
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    legacy_rope_fields: bool = False
    """Write `rope_theta` and `rope_scaling` as checkpoints from before transformers 5 have them."""
    context_tokens: int = 2048
    likely_end: bool = False
    """Whether end-of-sequence tokens get larger logits than others; if not, greedy answers run to their limit."""
    spare_vocabulary: int = 0
    """Rows of the embedding that no token of the tokenizer has, as real Qwen3 checkpoints have them."""
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


QWEN3 = Recipe("qwen3-5-layers-6-experts", Family.QWEN3_MOE)
QWEN3_TIED_SHARDED_BF16 = Recipe(
    "qwen3-7-layers-12-experts-tied-sharded-bf16",
    Family.QWEN3_MOE,
    layers=7,
    experts=12,
    experts_per_token=3,
    heads=8,
    tied=True,
    dtype=torch.bfloat16,
    max_shard_size="300KB",
    rope={"rope_type": "default", "rope_theta": 1_000_000.0},
    spare_vocabulary=13,
    seed=1,
)
MIXTRAL_SHARDED = Recipe(
    "mixtral-5-layers-12-experts-sharded", Family.MIXTRAL, experts=12, max_shard_size="300KB", seed=2
)
MIXTRAL_BF16 = Recipe(
    "mixtral-7-layers-6-experts-bf16",
    Family.MIXTRAL,
    layers=7,
    kv_heads=1,
    dtype=torch.bfloat16,
    rope={"rope_type": "default", "rope_theta": 1_000_000.0},
    legacy_rope_fields=True,
    seed=3,
)
MIXTRAL_SLIDING_TIED = Recipe(
    "mixtral-sliding-window-tied",
    Family.MIXTRAL,
    kv_heads=4,
    head_width=24,
    tied=True,
    likely_end=True,
    seed=4,
    options={"sliding_window": 48},
)
QWEN3_DENSE_LAYERS = Recipe(
    "qwen3-dense-layers-biases-plain-gates",
    Family.QWEN3_MOE,
    layers=7,
    likely_end=True,
    seed=5,
    options={
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
        "attention_bias": True,
        "intermediate_size": 80,
    },
)
QWEN3_YARN = Recipe(
    "qwen3-yarn",
    Family.QWEN3_MOE,
    rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 50_000.0},
    seed=6,
)
QWEN3_LINEAR_ROPE = Recipe(
    "qwen3-linear-rope",
    Family.QWEN3_MOE,
    rope={"rope_type": "linear", "factor": 2.5, "rope_theta": 10_000.0},
    legacy_rope_fields=True,
    seed=7,
)
RECIPES = (
    QWEN3,
    QWEN3_TIED_SHARDED_BF16,
    MIXTRAL_SHARDED,
    MIXTRAL_BF16,
    MIXTRAL_SLIDING_TIED,
    QWEN3_DENSE_LAYERS,
    QWEN3_YARN,
    QWEN3_LINEAR_ROPE,
)


def write_checkpoint(directory: Path, recipe: Recipe) -> Path:
    """Makes `directory` a checkpoint by `recipe` and returns it. The same recipe gives the same weights."""
    directory.mkdir(parents=True, exist_ok=True)
    style = TokenizerStyle.BYTE_LEVEL if recipe.family is Family.QWEN3_MOE else TokenizerStyle.SENTENCE_PIECE
    tokenizer = write_tokenizer(directory, style, recipe.context_tokens)
    config = _config(recipe, tokenizer.size + recipe.spare_vocabulary, tokenizer.end_token_ids[0])
    model: Any = Qwen3MoeForCausalLM(config) if isinstance(config, Qwen3MoeConfig) else MixtralForCausalLM(config)
    row_scales = dict.fromkeys(range(tokenizer.size, config.vocab_size), 0.02)
    row_scales |= dict.fromkeys(tokenizer.end_token_ids, 2.0 if recipe.likely_end else 0.02)
    randomize(model, recipe.seed, row_scales)
    model.generation_config.update(
        bos_token_id=tokenizer.begin_token_id,
        eos_token_id=list(tokenizer.end_token_ids),
        pad_token_id=tokenizer.end_token_ids[-1],
    )
    model.to(recipe.dtype).save_pretrained(directory, max_shard_size=recipe.max_shard_size)
    if recipe.legacy_rope_fields:
        _write_legacy_rope_fields(directory / "config.json")
    return directory


def _config(recipe: Recipe, vocabulary: int, end_token_id: int) -> Qwen3MoeConfig | MixtralConfig:
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_width,
        "num_experts_per_tok": recipe.experts_per_token,
        "max_position_embeddings": recipe.context_tokens,
        "tie_word_embeddings": recipe.tied,
        "rope_parameters": dict(recipe.rope),
        "bos_token_id": None,
        "eos_token_id": end_token_id,
    }
    if recipe.family is Family.MIXTRAL:
        own = {"num_local_experts": recipe.experts, "intermediate_size": recipe.expert_width, "sliding_window": None}
        return MixtralConfig(**(common | own | recipe.options))
    own = {
        "num_experts": recipe.experts,
        "moe_intermediate_size": recipe.expert_width,
        "intermediate_size": recipe.expert_width,
        "norm_topk_prob": True,
    }
    return Qwen3MoeConfig(**(common | own | recipe.options))


@torch.no_grad()
def randomize(model: Any, seed: int, row_scales: dict[int, float]) -> None:
    """Random weights whose logits have spread: small enough for softmax to stay soft, large enough to have a winner.

    The usual initialisation (0.02 everywhere) gives near-ties everywhere, and then comparing tokens compares rounding.
    `row_scales` multiplies rows of the output matrix: a small one makes its token never the greedy choice.
    """
    generator = torch.Generator().manual_seed(seed)
    output_matrix = model.get_output_embeddings()
    tied = output_matrix.weight is model.get_input_embeddings().weight
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.1 * noise + (1.0 if "norm" in name else 0.0))
        else:
            # Matrices are [..., out, in]: unit variance in gives `gain` out.
            parameter.copy_(noise * (_gain(name, tied) / parameter.shape[-1] ** 0.5))
    for token_id, scale in row_scales.items():
        output_matrix.weight[token_id] *= scale


def _gain(name: str, tied: bool) -> float:
    if "embed_tokens" in name or "lm_head" in name:
        # A tied matrix favours the token that came in, the more the larger it is: answers would be one token, repeated.
        return 1.2 if tied else 3.0
    # Sharper attention or gates than this would magnify rounding from layer to layer, up to what tests allow.
    return 1.5 if "gate.weight" in name else 1.0


def _write_legacy_rope_fields(path: Path) -> None:
    content = json.loads(path.read_text())
    rope = content.pop("rope_parameters")
    content["rope_theta"] = rope.pop("rope_theta")
    content["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    path.write_text(json.dumps(content, indent=2))
