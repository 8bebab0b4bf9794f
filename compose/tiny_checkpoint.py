"""A model to test with: a complete Hugging Face checkpoint with random weights, small enough to be made in a second.

    python -m compose.tiny_checkpoint DIR [--family qwen3_moe|mixtral] [--seed N]

It says nothing sensible, but every part of the mesh works on it as on a real one. Needs neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.checkpoint.model_config import ModelConfig, parse_model_config
from common.checkpoint.tensor_names import EMBEDDING, LM_HEAD, expert_tensors, stage_tensors
from common.errors import CheckpointError
from common.topology import LayerRange
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


GATE_UP_DOWN_GAINS = (1.0, 1.0, 3.0)
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
    config = _model_config(family, turn_end)
    write_json(directory / "config.json", config)
    generation = {"eos_token_id": [turn_end, end_of_text], "pad_token_id": end_of_text}
    write_json(directory / "generation_config.json", generation)
    speakable = _speakable_tokens(tokenizer, TINY.vocabulary)
    weights = _random_weights(parse_model_config(config), np.random.default_rng(seed), speakable)
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
    config: ModelConfig, random: np.random.Generator, speakable: npt.NDArray[np.bool_]
) -> dict[str, Weight]:
    """Returns every tensor under its Hugging Face name, float32, scaled so that the logits have spread."""
    routers = {f"model.layers.{layer}.{config.expert_names.router}": layer for layer in config.moe_layer_indices}
    gains = {EMBEDDING: config.hidden_size**0.5, LM_HEAD: 3.0} | dict.fromkeys(routers, 1.5)
    weights: dict[str, Weight] = {}
    for name, shape in stage_tensors(config, routers, LayerRange(0, config.num_layers)):
        weights[name] = _draw(random, shape, gains.get(name, 1.0))
        if name in routers:
            experts = expert_tensors(config, routers[name], range(config.num_experts))
            for (expert_name, expert_shape), gain in zip(experts, itertools.cycle(GATE_UP_DOWN_GAINS), strict=False):
                weights[expert_name] = _draw(random, expert_shape, gain)
    # Small rows give logits near 0, which never win against the spread of the others: answers stay readable.
    weights[LM_HEAD] *= np.where(speakable, 1, 0.02)[:, None].astype("f4")
    return weights


def _draw(random: np.random.Generator, shape: tuple[int, ...], gain: float) -> Weight:
    values = random.standard_normal(shape, dtype=np.float32)
    is_norm = len(shape) == 1
    return 1 + 0.1 * values if is_norm else values * np.float32(gain / shape[-1] ** 0.5)


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
