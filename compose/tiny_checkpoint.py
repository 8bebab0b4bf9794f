"""A model to test with: a complete Hugging Face checkpoint with random weights, small enough to be made in a second.

    python -m compose.tiny_checkpoint DIR [--family qwen3_moe|mixtral] [--seed N]

It says nothing sensible, but every part of the mesh works on it as on a real one. Needs neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.errors import CheckpointError
from compose.checkpoint_folder import (
    ModelSizes,
    common_config,
    qwen3_moe_config,
    tokenizer_config,
    whole_folder,
    write_json,
)

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TRAINING_TEXT = """\
A mesh serves one model. The router takes each request, turns its text into tokens, and plans the steps.
A stage holds a range of layers with their attention and their part of the cache. An expert holds the feed-forward
weights of a few experts, and answers whoever asks. Where there is more work, there can be more of them.
When a process dies, another one takes its place, and the answer goes on where it was. No token is lost,
no token comes twice, and nobody has to wait for long. Small things joined together make a large thing,
and the large thing keeps working while the small things come and go.
"""


Weight = npt.NDArray[np.float32]


class Family(StrEnum):
    """Model types as `config.json` names them."""

    QWEN3_MOE = "qwen3_moe"
    MIXTRAL = "mixtral"


TINY = ModelSizes(vocabulary=448, layers=4, width=64, kv_heads=2, head_width=16, expert_width=64, context_tokens=4096)


def write_tiny_checkpoint(directory: Path, family: Family = Family.QWEN3_MOE, seed: int = 0) -> Path:
    """Makes `directory` a complete checkpoint and returns it; one that is complete already is left as it is.

    The same seed gives the same bytes. Others see all files or none: they are written beside it and moved in one step.
    Raises CheckpointError if `directory` holds something else.
    """
    if is_complete(directory):
        return directory
    try:
        with whole_folder(directory) as workplace:
            _write_files(workplace, family, seed)
    except OSError as error:
        # Another process may have been faster with the same files.
        if not is_complete(directory):
            raise CheckpointError(f"cannot write a tiny checkpoint to {directory}: {error.strerror}") from error
    return directory


def is_complete(directory: Path) -> bool:
    """Returns whether every file of a tiny checkpoint is there."""
    return all((directory / name).is_file() for name in FILES)


def _write_files(directory: Path, family: Family, seed: int) -> None:
    tokenizer = _train_tokenizer(TINY.vocabulary)
    turn_end, end_of_text = SPECIAL_TOKENS.index(TURN_END), SPECIAL_TOKENS.index(END_OF_TEXT)
    tokenizer.save(str(directory / "tokenizer.json"))
    texts = tokenizer_config(TINY.context_tokens, TURN_END, END_OF_TEXT, CHAT_TEMPLATE)
    write_json(directory / "tokenizer_config.json", texts)
    write_json(directory / "config.json", _model_config(family, turn_end))
    generation = {"eos_token_id": [turn_end, end_of_text], "pad_token_id": end_of_text}
    write_json(directory / "generation_config.json", generation)
    speakable = _speakable_tokens(tokenizer, TINY.vocabulary)
    weights = _random_weights(family, TINY, np.random.default_rng(seed), speakable)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _train_tokenizer(vocabulary: int) -> Tokenizer:
    """Byte-level BPE: 3 special tokens, the 256 bytes, then pieces of TRAINING_TEXT: any text comes back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT.splitlines(keepends=True), trainer)
    return tokenizer


def _model_config(family: Family, eos_token_id: int) -> dict[str, Any]:
    if family is Family.QWEN3_MOE:
        return qwen3_moe_config(TINY, eos_token_id) | {"use_sliding_window": False}
    return common_config(family.value, TINY, eos_token_id) | {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": TINY.experts,
        "sliding_window": None,
    }


def _speakable_tokens(tokenizer: Tokenizer, vocabulary: int) -> npt.NDArray[np.bool_]:
    """[vocabulary] True where a token is printable text by itself: what a demonstration should consist of."""
    texts = [tokenizer.decode([token_id], skip_special_tokens=True) for token_id in range(vocabulary)]
    return np.array([text.isascii() and text.isprintable() and text != "" for text in texts])


def _random_weights(
    family: Family, sizes: ModelSizes, random: np.random.Generator, speakable: npt.NDArray[np.bool_]
) -> dict[str, Weight]:
    """Returns every tensor under its Hugging Face name, float32, scaled so that the logits have spread."""
    weights = {
        "model.embed_tokens.weight": _matrix(random, sizes.vocabulary, sizes.width, gain=sizes.width**0.5),
        # Small rows give logits near 0, which never win against the spread of the others: answers stay readable.
        "lm_head.weight": _matrix(random, sizes.vocabulary, sizes.width, gain=3.0)
        * np.where(speakable, 1, 0.02)[:, None].astype("f4"),
        "model.norm.weight": _norm(random, sizes.width),
    }
    for layer in range(sizes.layers):
        weights |= _layer_weights(family, sizes, random, f"model.layers.{layer}.")
    return weights


def _layer_weights(family: Family, sizes: ModelSizes, random: np.random.Generator, prefix: str) -> dict[str, Weight]:
    query_width, kv_width = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
    weights = {
        prefix + "input_layernorm.weight": _norm(random, sizes.width),
        prefix + "post_attention_layernorm.weight": _norm(random, sizes.width),
        prefix + "self_attn.q_proj.weight": _matrix(random, query_width, sizes.width),
        prefix + "self_attn.k_proj.weight": _matrix(random, kv_width, sizes.width),
        prefix + "self_attn.v_proj.weight": _matrix(random, kv_width, sizes.width),
        prefix + "self_attn.o_proj.weight": _matrix(random, sizes.width, query_width),
    }
    if family is Family.QWEN3_MOE:
        weights |= {prefix + f"self_attn.{name}_norm.weight": _norm(random, sizes.head_width) for name in ("q", "k")}
    moe, (gate, up, down) = {
        Family.QWEN3_MOE: ("mlp.", ("gate_proj", "up_proj", "down_proj")),
        Family.MIXTRAL: ("block_sparse_moe.", ("w1", "w3", "w2")),
    }[family]
    weights[prefix + moe + "gate.weight"] = _matrix(random, sizes.experts, sizes.width, gain=1.5)
    for expert in range(sizes.experts):
        expert_prefix = f"{prefix}{moe}experts.{expert}."
        weights |= {
            f"{expert_prefix}{gate}.weight": _matrix(random, sizes.expert_width, sizes.width),
            f"{expert_prefix}{up}.weight": _matrix(random, sizes.expert_width, sizes.width),
            f"{expert_prefix}{down}.weight": _matrix(random, sizes.width, sizes.expert_width, gain=3.0),
        }
    return weights


def _matrix(random: np.random.Generator, rows: int, columns: int, gain: float = 1.0) -> Weight:
    return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(gain / columns**0.5)


def _norm(random: np.random.Generator, width: int) -> Weight:
    return 1 + 0.1 * random.standard_normal(width, dtype=np.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with a sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m compose.tiny_checkpoint", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--family", type=Family, choices=list(Family), default=Family.QWEN3_MOE)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    try:
        print(write_tiny_checkpoint(parsed.directory, parsed.family, parsed.seed))
    except CheckpointError as error:
        print(error.message, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
