"""Sorting three words by the alphabet; no two of them begin with the same letter."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.task import Content, Task, read_list
from compose.demo.tasks.words import draw_word, word_key

NUM_WORDS = 3
MAX_LETTERS = 6


def _draw(random: Random, split: Split) -> Content:
    words: list[str] = []
    while len(words) < NUM_WORDS:
        word = draw_word(random, split, MAX_LETTERS)
        if all(word[0] != other[0] for other in words):
            words.append(word)
    slots = {"words": ", ".join(words), "spaced": " ".join(words)}
    return Content("sort", slots, ", ".join(sorted(words)) + ".", tuple(word_key(word) for word in words))


SORTING = Task(
    name="sorting",
    phrasings={
        "sort": expand(
            "[Sort|Order|Arrange] [these words|the words|the following words]: {words}",
            "[Sort|Order|Arrange] [these words|the words] [alphabetically|by the alphabet]: {words}",
            "[Put these words|Put the words] in [alphabetical order|order]: {words}",
            "Sort {words} [by the alphabet|alphabetically].",
            "Sort[ the words|] {spaced}",
        )
    },
    draw_content=_draw,
    read=read_list,
)
