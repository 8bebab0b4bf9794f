"""Phrasings: many ways to ask for one thing, written as a short grammar and expanded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import product
from random import Random

from compose.demo.held_out import Split, hash_percent

_ALTERNATIVES = re.compile(r"\[([^\]]*)\]")


def expand(*grammars: str) -> tuple[str, ...]:
    """Returns every sentence of grammars such as `[What is|Compute] {left} [plus|+] {right}?`; slots in braces stay
    open."""
    return tuple(sentence for grammar in grammars for sentence in _expand_one(grammar))


def _expand_one(grammar: str) -> Iterable[str]:
    # Splitting by a pattern with one group alternates: text, alternatives, text, ...
    parts = _ALTERNATIVES.split(grammar)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return ("".join(chosen) for chosen in product(*choices))


@cache
def of_split(phrasings: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """Returns the phrasings of one group that belong to a split: about one in seven is held out, and at least one.

    Only a sentence whose words all stand in sentences that remain is held out: nobody understands a word never heard.
    """
    by_hash = sorted(set(phrasings), key=lambda phrasing: (hash_percent(f"phrasing {phrasing}"), phrasing))
    uses = Counter(word for phrasing in by_hash for word in _words(phrasing))
    held_out: list[str] = []
    for phrasing in by_hash:
        words = _words(phrasing)
        if len(held_out) * 7 < len(by_hash) and all(uses[word] > 1 for word in words):
            held_out.append(phrasing)
            uses.subtract(words)
    if split is Split.HELD_OUT:
        return tuple(held_out)
    return tuple(phrasing for phrasing in by_hash if phrasing not in held_out)


def _words(phrasing: str) -> set[str]:
    return set(re.findall(r"[a-z]+", phrasing.lower()))


def dress(question: str, random: Random) -> str:
    """As people type: sometimes without a capital, without the last mark, with a "please"."""
    if random.random() < 0.4:
        question = question[0].lower() + question[1:]
    if random.random() < 0.3:
        question = question.rstrip("?.")
    if random.random() < 0.06:
        question = "Please " + question[0].lower() + question[1:]
    return question
