"""Sorting three or four words by the alphabet; no two of them begin with the same two letters."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.task import Content, Task, read_list
from compose.demo.tasks.words import draw_word, word_key

MAX_LETTERS = 7


def _draw(random: Random, split: Split) -> Content:
    num_words = random.choice((3, 3, 4))
    words: list[str] = []
    while len(words) < num_words:
        word = draw_word(random, split, MAX_LETTERS)
        if all(word[:2] != other[:2] for other in words):
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
            "Sort [the words|] {spaced}",
        )
    },
    draw_content=_draw,
    read=read_list,
)
