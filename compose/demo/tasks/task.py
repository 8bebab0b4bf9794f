"""What a task is: contents that are drawn at random, phrasings for them, and how an answer is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import dress, of_split


@dataclass(frozen=True, slots=True)
class Content:
    """What a question is about, before it is put into words."""

    kind: str
    """Which of the task's groups of phrasings fit."""
    slots: Mapping[str, str]
    answer: str
    keys: tuple[str, ...] = ()
    """What held-out questions must not share with training; empty for a table that is learned by heart."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer."""

    task: str
    question: str
    answer: str
    phrasing: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One thing that the demo model can do."""

    name: str
    phrasings: Mapping[str, tuple[str, ...]]
    draw_content: Callable[[Random, Split], Content]
    """May return content of the other split: `draw` then asks again. Takes the split to draw words from it."""
    read: Callable[[str], object]
    """The part of an answer that counts, comparable by `==`."""
    fixed_words: str = ""
    """Words of questions and answers that are not arguments and stand in no phrasing: each becomes one token."""
    spells_phrasings: bool = False
    """Whether the words of its phrasings are read letter by letter, like words that were not foreseen."""

    def draw(self, random: Random, split: Split) -> Exchange:
        """Returns a random exchange of that split: numbers, words and phrasing all belong to it."""
        content = self.draw_content(random, split)
        while not split.allows_content(content.keys):
            content = self.draw_content(random, split)
        phrasing = random.choice(of_split(self.phrasings[content.kind], split))
        question = dress(phrasing.format(**content.slots), random)
        return Exchange(self.name, question, content.answer, phrasing, content.keys)

    def is_right(self, expected: str, answer: str) -> bool:
        """Returns whether an answer says the same as the expected one."""
        return self.read(answer) == self.read(expected)


def read_last_number(answer: str) -> int | None:
    """`132` for "47 + 85 = 132."; None without a number."""
    numbers = re.findall(r"\d+", answer)
    return int(numbers[-1]) if numbers else None


def read_list(answer: str) -> tuple[str, ...]:
    """`("fig", "pear")` for "fig, pear."."""
    return tuple(item.strip() for item in answer.strip().rstrip(".").split(","))


def read_text(answer: str) -> str:
    """Returns the whole answer, but for spaces around it."""
    return answer.strip()
