"""Random Qwen3-MoE checkpoints of known sizes, to time engines on.

    python -m tests.benchmarks.make_bench_model DIR [--model bench|seed|small] [--dtype bfloat16|float32]

`bench` has 0.42 B parameters, 82 M of them active a token; `seed` the same number in more and narrower layers; `small`
is there to try a benchmark out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import string
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class BenchSizes:
    """Letters as in the model code: D width, H heads, E experts, K experts a token, F expert width, L layers."""

    layers: int
    width: int
    heads: int
    head_width: int
    kv_heads: int
    experts: int
    experts_per_token: int
    expert_width: int
    vocabulary: int = 8192
    context_tokens: int = 32_768

    @property
    def num_parameters(self) -> int:
        """All of them, from the shapes."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_width + 2 * self.head_width
        experts = self.experts * 3 * self.width * self.expert_width
        layer = attention + experts + self.experts * self.width + 2 * self.width
        return self.layers * layer + 2 * self.vocabulary * self.width + self.width


SIZES = {
    "bench": BenchSizes(
        layers=10,
        width=1024,
        heads=16,
        head_width=64,
        kv_heads=4,
        experts=32,
        experts_per_token=4,
        expert_width=384,
    ),
    "seed": BenchSizes(
        layers=16,
        width=512,
        heads=16,
        head_width=32,
        kv_heads=4,
        experts=16,
        experts_per_token=2,
        expert_width=1024,
    ),
    "small": BenchSizes(
        layers=4,
        width=256,
        heads=8,
        head_width=32,
        kv_heads=2,
        experts=8,
        experts_per_token=2,
        expert_width=128,
    ),
}


def make_bench_model(directory: Path, model: str = "bench", dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Makes `directory` that checkpoint and returns it; one that is complete and has this config is left as it is."""
    sizes = SIZES[model]
    config = _model_config(sizes, dtype)
    if _is_complete(directory, config):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _tokenizer(sizes.vocabulary).save(str(workplace / "tokenizer.json"))
        _write_json(workplace / "tokenizer_config.json", _tokenizer_config(sizes))
        _write_json(workplace / "config.json", config)
        _write_json(workplace / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": 0})
        save_file(_weights(sizes, DTYPES[dtype], seed), workplace / "model.safetensors", metadata={"format": "pt"})
        workplace.chmod(0o755)
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(workplace, directory)
    except BaseException:
        shutil.rmtree(workplace, ignore_errors=True)
        raise
    return directory


def _is_complete(directory: Path, config: dict[str, object]) -> bool:
    is_whole = all((directory / name).is_file() for name in FILES)
    return is_whole and json.loads((directory / "config.json").read_text()) == config


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _tokenizer(vocabulary: int) -> Tokenizer:
    """Byte-level BPE of exactly this size: special tokens, bytes, pairs of letters, then as many triples as fit."""
    letters = string.ascii_lowercase
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    triples = ["".join(triple) for triple in itertools.product(letters, repeat=3)]
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *pairs, *triples][:vocabulary]
    merges = [(token[:-1], token[-1]) for token in tokens[len(SPECIAL_TOKENS) + 256 :]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _tokenizer_config(sizes: BenchSizes) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sizes.context_tokens,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _model_config(sizes: BenchSizes, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": dtype,
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_width,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "moe_intermediate_size": sizes.expert_width,
        "intermediate_size": sizes.expert_width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.context_tokens,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
    }


def _weights(sizes: BenchSizes, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        noise = torch.randn(rows, columns, generator=generator)
        return noise.mul_(gain / columns**0.5).to(dtype)

    def norm(width: int) -> torch.Tensor:
        return torch.ones(width, dtype=dtype)

    query_width, kv_width = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
    weights = {
        "model.embed_tokens.weight": matrix(sizes.vocabulary, sizes.width, gain=sizes.width**0.5),
        "lm_head.weight": matrix(sizes.vocabulary, sizes.width, gain=3.0),
        "model.norm.weight": norm(sizes.width),
    }
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": norm(sizes.width),
            prefix + "post_attention_layernorm.weight": norm(sizes.width),
            prefix + "self_attn.q_proj.weight": matrix(query_width, sizes.width),
            prefix + "self_attn.k_proj.weight": matrix(kv_width, sizes.width),
            prefix + "self_attn.v_proj.weight": matrix(kv_width, sizes.width),
            prefix + "self_attn.o_proj.weight": matrix(sizes.width, query_width),
            prefix + "self_attn.q_norm.weight": norm(sizes.head_width),
            prefix + "self_attn.k_norm.weight": norm(sizes.head_width),
            prefix + "mlp.gate.weight": matrix(sizes.experts, sizes.width),
        }
        for expert in range(sizes.experts):
            expert_prefix = f"{prefix}mlp.experts.{expert}."
            weights |= {
                expert_prefix + "gate_proj.weight": matrix(sizes.expert_width, sizes.width),
                expert_prefix + "up_proj.weight": matrix(sizes.expert_width, sizes.width),
                expert_prefix + "down_proj.weight": matrix(sizes.width, sizes.expert_width),
            }
    return weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the directory and the number of parameters."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.make_bench_model")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--model", choices=sorted(SIZES), default="bench")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parsed = parser.parse_args(arguments)
    make_bench_model(parsed.directory, parsed.model, parsed.dtype)
    print(f"{parsed.directory}: {SIZES[parsed.model].num_parameters / 1e6:.0f} M parameters, {parsed.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
