"""What can be done with the letters of one word: reverse it, spell it, count its letters, count one letter."""

from __future__ import annotations

import string
from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.task import Content, Task, read_last_number, read_text
from compose.demo.tasks.words import draw_word, word_key

MAX_LETTERS = 7

_WORD = '[{word}|the word {word}|the word "{word}"|"{word}"]'


def _draw_reversal(random: Random, split: Split) -> Content:
    word = draw_word(random, split, MAX_LETTERS)
    return Content("reverse", {"word": word}, word[::-1], (word_key(word),))


def _draw_spelling(random: Random, split: Split) -> Content:
    word = draw_word(random, split, MAX_LETTERS)
    return Content("spell", {"word": word}, "-".join(word), (word_key(word),))


def _count_aloud(word: str, counted: str) -> str:
    """`f0 o0 s1 s2` for the s in "foss": a step a letter, so that no token has to see the whole word."""
    steps: list[str] = []
    number = 0
    for letter in word:
        number += letter in counted
        steps.append(f"{letter}{number}")
    return " ".join(steps)


def _draw_count(random: Random, split: Split) -> Content:
    word = draw_word(random, split, MAX_LETTERS)
    if random.random() < 0.4:
        return Content("all", {"word": word}, f"{_count_aloud(word, word)}: {len(word)} letters.", (word_key(word),))
    # A letter that is in the word twice or more is rare: repeated letters get their share.
    repeated = [letter for letter in sorted(set(word)) if word.count(letter) > 1]
    if repeated and random.random() < 0.6:
        letter = random.choice(repeated)
    else:
        letter = random.choice(word if random.random() < 0.75 else string.ascii_lowercase)
    return Content(
        "one",
        {"word": word, "letter": letter},
        f"{_count_aloud(word, letter)}: {word.count(letter)} times.",
        (word_key(word),),
    )


REVERSING = Task(
    name="reversing",
    phrasings={
        "reverse": expand(
            f"[Reverse|Turn around|Write backwards] {_WORD}.",
            f"[What is|Write|Give me|Say] {_WORD} [backwards|reversed|in reverse].",
        )
    },
    draw_content=_draw_reversal,
    read=read_text,
)

SPELLING = Task(
    name="spelling",
    phrasings={
        "spell": expand(
            f"[Spell|Spell out|How do you spell|Can you spell|How is] {_WORD}[| letter by letter].",
            f"[What are|Give me|Tell me|List] the letters [of|in] {_WORD}.",
        )
    },
    draw_content=_draw_spelling,
    read=read_text,
)

COUNTING = Task(
    name="counting letters",
    phrasings={
        "all": expand(
            f"[How many letters are in|How many letters are there in] {_WORD}?",
            f"Count the letters [of|in] {_WORD}.",
            "How many letters [does {word} have|has {word}]?",
            f"How long is {_WORD}?",
        ),
        "one": expand(
            f"How [many times|often] is [the letter |]{{letter}} in {_WORD}?",
            f"How [many times|often] does [the letter |]{{letter}} [appear|occur] in {_WORD}?",
            f"How many {{letter}} are in {_WORD}?",
            f"Count the letter {{letter}} in {_WORD}.",
        ),
    },
    draw_content=_draw_count,
    read=read_last_number,
)
