"""Conversations side by side against one engine, each turn with all that was said before it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tests.benchmarks.agents.conversations import Conversation
from tests.benchmarks.streaming_client import Answer


class Answering(Protocol):
    """An engine that tells what it answers."""

    async def ask(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Answer:
        """Raises RuntimeError if other than `max_tokens` tokens come, with all ids."""
        ...


@dataclass(frozen=True)
class PlayedTurn:
    """One answer."""

    prompt_tokens: int
    """The whole history with the new message."""
    answer: Answer


Played = list[list[PlayedTurn]]
"""By conversation and turn; shorter conversations were stopped."""


async def play(
    engine: Answering,
    conversations: Sequence[Conversation],
    time_limit_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> Played:
    """Plays all conversations at once. After `time_limit_s` no turn begins.

    A turn's prompt is the opening, all messages up to this one, and the engine's own answers between them. Raises what
    the engine raises.
    """
    stop_s = clock() + time_limit_s

    async def converse(conversation: Conversation) -> list[PlayedTurn]:
        history, played = list(conversation.opening), list[PlayedTurn]()
        for turn in conversation.turns:
            await sleep(turn.think_s)
            if clock() >= stop_s:
                break
            history += turn.message
            answer = await engine.ask(history, turn.answer_tokens, turn.seed)
            played.append(PlayedTurn(len(history), answer))
            history += answer.token_ids
        return played

    return await asyncio.gather(*map(converse, conversations))
