"""Sorting three or four words by the alphabet; no two of them begin with the same two letters."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Ranges, Split
from compose.demo.phrasing import expand
from compose.demo.tasks.task import Content, Task, read_list
from compose.demo.tasks.words import draw_word, word_key

MAX_LETTERS = {Ranges.NARROW: 6, Ranges.WIDE: 7}


def _draw(random: Random, split: Split, ranges: Ranges) -> Content:
    is_wide = ranges is Ranges.WIDE
    num_words = random.choice((3, 4)) if is_wide else 3
    num_different = 2 if is_wide else 1
    words: list[str] = []
    while len(words) < num_words:
        word = draw_word(random, split, MAX_LETTERS[ranges])
        if all(word[:num_different] != other[:num_different] for other in words):
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
