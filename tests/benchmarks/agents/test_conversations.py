"""What is said is drawn within its bounds, and the same for the same source."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.agents.conversations import NUM_SPECIAL_TOKENS, Traffic, count_equal, draw_conversations

VOCABULARY = 50
ENDS = st.tuples(st.integers(1, 20), st.integers(0, 20)).map(lambda drawn: (drawn[0], drawn[0] + drawn[1]))
TRAFFIC = st.builds(
    Traffic,
    conversations=st.integers(1, 5),
    turns=st.integers(1, 5),
    system_tokens=st.integers(1, 50),
    message_tokens=ENDS,
    answer_tokens=ENDS,
    think_s=st.tuples(st.floats(0, 1), st.floats(1, 2)),
)


@given(TRAFFIC, st.integers(0, 2**32))
def test_all_begin_alike_and_stay_within_the_bounds(traffic: Traffic, seed: int) -> None:
    conversations = draw_conversations(traffic, VOCABULARY, random.Random(seed))
    assert conversations == draw_conversations(traffic, VOCABULARY, random.Random(seed))
    assert len(conversations) == traffic.conversations
    assert len({conversation.opening for conversation in conversations}) == 1
    for conversation in conversations:
        assert len(conversation.opening) == traffic.system_tokens
        assert len(conversation.turns) == traffic.turns
        for turn in conversation.turns:
            assert traffic.message_tokens[0] <= len(turn.message) <= traffic.message_tokens[1]
            assert traffic.answer_tokens[0] <= turn.answer_tokens <= traffic.answer_tokens[1]
            assert traffic.think_s[0] <= turn.think_s <= traffic.think_s[1]
            assert all(NUM_SPECIAL_TOKENS <= token < VOCABULARY for token in turn.message)
        said = sum(len(turn.message) + turn.answer_tokens for turn in conversation.turns)
        assert traffic.system_tokens + said <= traffic.context_tokens


def test_messages_and_seeds_are_each_conversations_own() -> None:
    traffic = Traffic(8, 20, 10, (60, 200), (40, 60), (0.2, 1.0))
    turns = [turn for each in draw_conversations(traffic, 8192, random.Random(0)) for turn in each.turns]
    assert len({turn.message for turn in turns}) == len({turn.seed for turn in turns}) == 160


def test_turns_that_only_one_engine_has_played_are_not_compared() -> None:
    whole: list[list[tuple[int, ...]]] = [[(1, 2), (3,)], [(4,), (5,)]]
    stopped: list[list[tuple[int, ...]]] = [[(1, 2)], [(4,), (6,)]]
    assert count_equal(whole, whole) == (4, 4)
    assert count_equal(whole, stopped) == count_equal(stopped, whole) == (2, 3)
