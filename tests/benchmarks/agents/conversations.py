"""What is said in conversations that begin alike: drawn once, the same for every engine. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

NUM_SPECIAL_TOKENS = 3
"""The first ids of a bench model; nobody says them."""


@dataclass(frozen=True)
class Traffic:
    """The shape of the conversations. Ranges hold both ends, and are drawn from evenly."""

    conversations: int
    turns: int
    system_tokens: int
    """Of the prompt with which all of them begin."""
    message_tokens: tuple[int, int]
    answer_tokens: tuple[int, int]
    """2 or more."""
    think_s: tuple[float, float]
    """Before each message, from the end of the answer before it."""

    @property
    def context_tokens(self) -> int:
        """What the longest of such conversations needs."""
        return self.system_tokens + self.turns * (self.message_tokens[1] + self.answer_tokens[1])


@dataclass(frozen=True)
class PlannedTurn:
    """A message and what is to be answered."""

    think_s: float
    message: tuple[int, ...]
    answer_tokens: int
    seed: int


@dataclass(frozen=True)
class Conversation:
    """What one client is going to say."""

    opening: tuple[int, ...]
    turns: tuple[PlannedTurn, ...]


def draw_conversations(traffic: Traffic, vocabulary: int, source: random.Random) -> list[Conversation]:
    """Returns conversations with one opening, and messages of their own."""
    opening = _draw_tokens(traffic.system_tokens, vocabulary, source)
    return [
        Conversation(opening, tuple(_draw_turn(traffic, vocabulary, source) for _ in range(traffic.turns)))
        for _ in range(traffic.conversations)
    ]


def _draw_turn(traffic: Traffic, vocabulary: int, source: random.Random) -> PlannedTurn:
    return PlannedTurn(
        think_s=source.uniform(*traffic.think_s),
        message=_draw_tokens(source.randint(*traffic.message_tokens), vocabulary, source),
        answer_tokens=source.randint(*traffic.answer_tokens),
        seed=source.getrandbits(32),
    )


def _draw_tokens(count: int, vocabulary: int, source: random.Random) -> tuple[int, ...]:
    return tuple(source.randrange(NUM_SPECIAL_TOKENS, vocabulary) for _ in range(count))


def count_equal(first: Sequence[Sequence[Sequence[int]]], second: Sequence[Sequence[Sequence[int]]]) -> tuple[int, int]:
    """Returns how many answers are equal, and how many both have; by conversation and turn, as token ids."""
    pairs = [
        (ours, theirs)
        for one, other in zip(first, second, strict=True)
        for ours, theirs in zip(one, other, strict=False)  # one of them may have been stopped
    ]
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)
