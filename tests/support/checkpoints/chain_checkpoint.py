"""Checkpoints whose right text is known without a reference: each token has one successor, said with certainty.

A one-hot embedding, layers that add nothing, and an lm_head that maps each token to the next of its chain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH = 512
"""Tokens of the vocabulary at most: each has a direction of its own."""
_HEADS, _HEAD_WIDTH, _EXPERTS, _EXPERT_WIDTH, _LAYERS = 4, 16, 4, 32, 2


def write_chain(directory: Path, vocabulary: int, successors: Mapping[int, int], **config: Any) -> Path:
    """Adds config.json and model.safetensors (Mixtral) to a tokenizer's directory; `config` overrides."""
    assert vocabulary <= WIDTH
    fields = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "torch_dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "head_dim": _HEAD_WIDTH,
        "intermediate_size": _EXPERT_WIDTH,
        "num_local_experts": _EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(fields | config, indent=1))
    save_file(chain_tensors(vocabulary, successors), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def chain_tensors(vocabulary: int, successors: Mapping[int, int]) -> dict[str, torch.Tensor]:
    """All weights by their names."""
    head = torch.zeros(vocabulary, WIDTH)
    for token_id, successor in successors.items():
        head[successor, token_id] = 1
    tensors = {
        "model.embed_tokens.weight": torch.eye(vocabulary, WIDTH),
        "lm_head.weight": head,
        "model.norm.weight": torch.ones(WIDTH),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(WIDTH)
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = torch.zeros(_HEADS * _HEAD_WIDTH, WIDTH)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = torch.zeros(WIDTH, _HEADS * _HEAD_WIDTH)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = torch.zeros(_EXPERTS, WIDTH)
        shapes = {"w1": (_EXPERT_WIDTH, WIDTH), "w3": (_EXPERT_WIDTH, WIDTH), "w2": (WIDTH, _EXPERT_WIDTH)}
        for expert in range(_EXPERTS):
            for name, shape in shapes.items():
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = torch.zeros(shape)
    return tensors
