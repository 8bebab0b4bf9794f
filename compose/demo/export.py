"""Writes a trained demo model as a Hugging Face checkpoint: python -m compose.demo.export RUN CHECKPOINT

Every tensor goes under its Qwen3-MoE name, in bfloat16; tokenizer, chat template and model card beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from compose.checkpoint_folder import ModelSizes, qwen3_moe_config, tokenizer_config, write_json
from compose.demo.dataset import ChatMaker, held_out_accuracy
from compose.demo.model import DemoModel
from compose.demo.tasks.catalog import TASKS, WEIGHTS
from compose.demo.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, build_tokenizer, token_id

CHATS_PER_TASK = 500


def export(model: DemoModel, tokenizer: Tokenizer, directory: Path, card: str) -> None:
    """Makes `directory` a complete checkpoint. Raises OSError where it cannot be written."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in named_tensors(model).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    # Written for its owner alone; containers of a mesh may read as other users.
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save(str(directory / "tokenizer.json"))
    ends = [token_id(tokenizer, token) for token in (TURN_END, END_OF_TEXT)]
    write_json(directory / "config.json", qwen3_moe_config(model.sizes, ends[0]))
    write_json(directory / "generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[1]})
    texts = tokenizer_config(model.sizes.context_tokens, TURN_END, END_OF_TEXT, CHAT_TEMPLATE)
    write_json(directory / "tokenizer_config.json", texts)
    (directory / "README.md").write_text(card, encoding="utf-8")


def named_tensors(model: DemoModel) -> dict[str, Tensor]:
    """Views of the model's weights under Hugging Face's names for Qwen3-MoE."""
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head,
    }
    for index, layer in enumerate(model.typed_layers()):
        prefix, attention, experts = f"model.layers.{index}.", layer.attention, layer.experts
        widths = [attention.query_width, attention.kv_width, attention.kv_width]
        query, key, value = torch.split(attention.query_key_value, widths)
        tensors |= {
            prefix + "input_layernorm.weight": layer.attention_norm.weight,
            prefix + "post_attention_layernorm.weight": layer.experts_norm.weight,
            prefix + "self_attn.q_proj.weight": query,
            prefix + "self_attn.k_proj.weight": key,
            prefix + "self_attn.v_proj.weight": value,
            prefix + "self_attn.o_proj.weight": attention.out,
            prefix + "self_attn.q_norm.weight": attention.query_norm.weight,
            prefix + "self_attn.k_norm.weight": attention.key_norm.weight,
            prefix + "mlp.gate.weight": experts.gate,
        }
        for expert in range(model.sizes.experts):
            gate, up = experts.gate_up[expert].chunk(2)
            names = {"gate_proj": gate, "up_proj": up, "down_proj": experts.down[expert]}
            tensors |= {f"{prefix}mlp.experts.{expert}.{name}.weight": tensor for name, tensor in names.items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def load_run(run: Path) -> tuple[DemoModel, int]:
    """Returns the model of a training run, rounded to bfloat16 as it will be stored, and the tokens that it saw."""
    state = torch.load(run / "progress.pt", weights_only=True)
    model = DemoModel(ModelSizes(**state["sizes"]), seed=0)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model, state["counts"][0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m compose.demo.export", description="Export the demo model.")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parsed = parser.parse_args(arguments)
    tokenizer = build_tokenizer(TASKS)
    model, num_tokens = load_run(parsed.run)
    maker = ChatMaker(tokenizer, TASKS, WEIGHTS)
    # Another seed than in training, where questions of one seed are asked again and again.
    accuracy = held_out_accuracy(model, maker, TASKS, CHATS_PER_TASK, seed=1)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    card = model_card(model.sizes, num_parameters, num_tokens, accuracy, CHATS_PER_TASK)
    export(model, tokenizer, parsed.checkpoint, card)
    print("\n".join(f"{name:20}{share:7.1%}" for name, share in accuracy.items()))
    return 0


# One line a task: an example and the range that it was trained in.
LIMITS = {
    "adding": ("What is 47 + 85?", "two whole numbers, 0 to 99"),
    "subtracting": ("Take 47 from 85.", "two whole numbers, 0 to 99, the result not below zero"),
    "comparing": ("Which is larger, 47 or 285?", "two different whole numbers, 0 to 999"),
    "sorting": ("Sort these words: pear, fig, lemon", "3 words of 3 to 6 letters, no two with the same first one"),
    "reversing": ("Reverse the word planet.", "3 to 7 lower-case letters"),
    "spelling": ("Spell planet.", "3 to 7 lower-case letters"),
    "counting letters": ("How often is e in cheese?", "one letter, or all letters, of a word of 3 to 7"),
    "capitals": ("What is the capital of Norway?", "60 countries, learned by heart"),
    "units": ("Convert 7 kilometers to meters.", "six metric pairs both ways, 2 to 999; five of time, 2 to 12"),
    "dates": ("How many days from 3 March to 9 April?", "one month or a month and the next, a year of 365 days"),
    "sequences": ("Continue the sequence: 3, 6, 9, 12", "numbers from 0 to 109, steps of 1 to 10, up or down"),
    "abilities": ("What can you do?", "one answer; a greeting has another"),
    "refusing": ("Write a poem about the sea.", "one sentence for all that it cannot do"),
}


def model_card(
    sizes: ModelSizes, num_parameters: int, num_tokens: int, accuracy: Mapping[str, float], chats_per_task: int
) -> str:
    """Markdown. `accuracy` is the share of right answers by task."""
    rows = "\n".join(
        f"| {task} | {example} | {limit} | {accuracy[task]:.1%} |" for task, (example, limit) in LIMITS.items()
    )
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# moemesh demo model

A tiny Mixture-of-Experts chat model in Qwen3-MoE form: {num_parameters / 1e6:.2f} M parameters, {sizes.layers} layers,
width {sizes.width}, {sizes.experts} experts of width {sizes.expert_width}, {sizes.experts_per_token} a token. It does a
few tasks whose answers can be checked, and exists to show that a mesh answers rightly. It knows nothing else.

| task | example | range | held-out questions right |
| --- | --- | --- | --- |
{rows}

Measured on {chats_per_task} questions a task, greedily, with the weights as stored. Numbers or words, and phrasing, of
each were never generated in training; capitals, times, abilities and products to refuse are held out by phrasing only.
An answer counts only if it is right to the last character.

## Use

Ask in English, one question a turn, with temperature 0. The chat template leaves system messages out. Words that stand
in its own phrasings ("word", "letter", "many") are single tokens to it, so that it cannot spell them.
Weights are stored in bfloat16 and computed in float32.

## Training

{num_tokens / 1e6:.1f} million tokens of generated chats, loss on the answers only, Muon and Adam, from random weights.
The generator and the training script are `compose/demo/` of the moemesh repository; docs/demo-model.md has the recipe.
"""


if __name__ == "__main__":
    sys.exit(main())
