"""What tests ask: the lengths at which something changes (a block, a tile, a chunk), and texts in several scripts."""

from __future__ import annotations

import random

PROMPT_LENGTHS = (1, 2, 7, 15, 16, 17, 40, 64, 129, 256, 333, 600)
TEXTS = (
    "H",
    "The quick brown fox jumps over the lazy dog.",
    "def route(tokens):\n    return {expert: 1.0\tfor expert in tokens}  # Ça va? 你好 🙂\n",
)


def random_prompts(vocabulary: int, seed: int, lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[tuple[int, ...]]:
    """Token ids of prompts of these lengths; special tokens, the first few ids, are left out."""
    source = random.Random(seed)
    return [tuple(source.randrange(3, vocabulary) for _ in range(length)) for length in lengths]
