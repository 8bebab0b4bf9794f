"""A checkpoint's folder as it is made here: its texts, and how it comes to be there whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What decides the number of parameters, and what a mesh has to share out. The defaults are the demo model's."""

    vocabulary: int
    layers: int = 5
    width: int = 128
    heads: int = 4
    kv_heads: int = 4
    head_width: int = 32
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 128
    context_tokens: int = 2048
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6


@contextlib.contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """Gives a folder to be filled, which then is `directory`: others see all of it or nothing. Raises OSError, where
    something lies there already, too."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield workplace
        # Made for their owner alone; processes of one mesh may read as other users.
        workplace.chmod(0o755)
        for path in workplace.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.rename(workplace, directory)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes it so that the same content has the same bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def common_config(model_type: str, sizes: ModelSizes, eos_token_id: int) -> dict[str, Any]:
    """Returns what `config.json` says of a model of any family. Weights are computed in float32: they are tiny
    anyway."""
    return {
        "model_type": model_type,
        "torch_dtype": "float32",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_width,
        "num_experts_per_tok": sizes.experts_per_token,
        "intermediate_size": sizes.expert_width,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.context_tokens,
        "rms_norm_eps": sizes.norm_epsilon,
        "rope_theta": sizes.rope_theta,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "use_cache": True,
    }


def qwen3_moe_config(sizes: ModelSizes, eos_token_id: int) -> dict[str, Any]:
    """Returns the content of `config.json` for a Qwen3-MoE."""
    return common_config("qwen3_moe", sizes, eos_token_id) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.expert_width,
        "norm_topk_prob": True,
        "num_experts": sizes.experts,
    }


def tokenizer_config(context_tokens: int, turn_end: str, end_of_text: str, chat_template: str) -> dict[str, Any]:
    """Returns the content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_tokens,
        "bos_token": None,
        "eos_token": turn_end,
        "pad_token": end_of_text,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
