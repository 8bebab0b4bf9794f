"""A turn's prompt is all that was said before it, and turns follow each other as planned."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tests.benchmarks.agents.conversations import Conversation, PlannedTurn
from tests.benchmarks.agents.playing import play
from tests.benchmarks.streaming_client import Answer, StreamTimes


class Echo:
    """Answers with the seed, as often as tokens are asked for, in a second each; its clock stands still otherwise."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.asked: list[tuple[float, list[int]]] = []

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    async def ask(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Answer:
        self.asked.append((self.now_s, list(prompt)))
        self.now_s += max_tokens
        return Answer(StreamTimes(0.0, ((1.0, max_tokens),)), (seed,) * max_tokens, None)


def turn(think_s: float, message: tuple[int, ...], answer_tokens: int, seed: int) -> PlannedTurn:
    return PlannedTurn(think_s, message, answer_tokens, seed)


TURNS = (turn(0.5, (1, 2), 2, 90), turn(0.25, (3,), 3, 91), turn(1.0, (4,), 2, 92))


def test_a_prompt_is_the_opening_and_everything_said_since() -> None:
    engine = Echo()
    (played,) = asyncio.run(play(engine, [Conversation((7, 8), TURNS)], 100, engine.clock, engine.sleep))
    assert [prompt for _, prompt in engine.asked] == [
        [7, 8, 1, 2],
        [7, 8, 1, 2, 90, 90, 3],
        [7, 8, 1, 2, 90, 90, 3, 91, 91, 91, 4],
    ]
    assert [each.prompt_tokens for each in played] == [4, 7, 11]


def test_a_turn_begins_when_the_last_one_has_ended_and_its_time_to_think_is_over() -> None:
    engine = Echo()
    asyncio.run(play(engine, [Conversation((7,), TURNS)], 100, engine.clock, engine.sleep))
    assert [at_s for at_s, _ in engine.asked] == [0.5, 2.75, 6.75]


def test_no_turn_begins_after_the_time_limit() -> None:
    engine = Echo()
    (played,) = asyncio.run(play(engine, [Conversation((7,), TURNS)], 3, engine.clock, engine.sleep))
    assert len(played) == 2


def test_conversations_go_on_side_by_side() -> None:
    both = asyncio.Barrier(2)

    class Patient(Echo):
        async def ask(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Answer:
            await both.wait()
            return await super().ask(prompt, max_tokens, seed)

    engine = Patient()
    conversations = [Conversation((7,), TURNS[:1]), Conversation((7,), TURNS[:1])]
    played = asyncio.run(asyncio.wait_for(play(engine, conversations, 100, engine.clock, engine.sleep), 10))
    assert [len(turns) for turns in played] == [1, 1]


def test_what_the_engine_raises_ends_all() -> None:
    class Broken(Echo):
        async def ask(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Answer:
            raise RuntimeError("HTTP 500")

    engine = Broken()
    with pytest.raises(RuntimeError, match="HTTP 500"):
        asyncio.run(play(engine, [Conversation((7,), TURNS)] * 2, 100, engine.clock, engine.sleep))
