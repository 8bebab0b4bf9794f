"""The README of the exported checkpoint: what the model can do, within which limits, and how well."""

from __future__ import annotations

from collections.abc import Mapping

from compose.demo.model import DemoSizes

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
    sizes: DemoSizes, num_parameters: int, num_tokens: int, accuracy: Mapping[str, float], chats_per_task: int
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
