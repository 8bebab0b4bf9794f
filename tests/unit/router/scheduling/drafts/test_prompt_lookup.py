"""What is guessed from a request's own text, beside a naive search of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ids import RequestId
from services.router.scheduling.drafts import prompt_lookup
from services.router.scheduling.drafts.prompt_lookup import LENGTHS, PromptLookup
from services.router.scheduling.drafts.source import Guess

A, B = RequestId("a"), RequestId("b")
SHORTEST, LONGEST = LENGTHS[-1], LENGTHS[0]


def naive_guess(text: Sequence[int], most: int) -> Guess:
    """By the rule: longest length first, latest place first; a text that ends in mid-repetition goes on with it."""
    for grade, length in zip(reversed(range(len(LENGTHS))), LENGTHS, strict=True):
        for end in range(len(text) - 1, length - 1, -1):
            if list(text[end - length : end]) == list(text[len(text) - length :]):
                going_on = list(text)
                while len(going_on) < len(text) + most:
                    going_on.append(going_on[end + len(going_on) - len(text)])
                return Guess(tuple(going_on[len(text) :]), grade)
    return Guess()


def propose(lookup: PromptLookup, text: Sequence[int], num_prompt: int, most: int = 15) -> Guess:
    return lookup.propose(A, tuple(text[:num_prompt]), list(text[num_prompt:]), most)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=150),
    st.data(),
    st.integers(1, 20),
)
def test_what_is_guessed_is_what_a_naive_search_finds_however_the_text_came(
    text: list[int], data: st.DataObject, most: int
) -> None:
    num_prompt = data.draw(st.integers(1, len(text)), "prompt tokens")
    asked_at = data.draw(st.sets(st.integers(num_prompt, len(text)), min_size=1), "when it is asked")
    lookup = PromptLookup()
    for stop in sorted(asked_at):
        assert propose(lookup, text[:stop], num_prompt, most) == naive_guess(text[:stop], most)


@pytest.mark.parametrize("num_tokens", [5, 70, 1200, 5000])
def test_a_place_is_found_whether_its_runs_lie_in_the_dict_or_in_the_array(num_tokens: int) -> None:
    source = random.Random(num_tokens)
    piece = [source.randrange(2**31) for _ in range(LONGEST + 9)]
    text = [source.randrange(2**31) for _ in range(num_tokens)] + piece
    text += [source.randrange(2**31) for _ in range(num_tokens)]
    lookup = PromptLookup()
    for token in piece[:-5]:
        propose(lookup, text, num_tokens, 5)
        text.append(token)
    guess = propose(lookup, text, num_tokens, 5)
    assert guess == Guess(tuple(piece[-5:]), grade=len(LENGTHS) - 1)


def test_the_longer_run_counts_and_of_equal_ones_the_later_place() -> None:
    run = list(range(10, 10 + LENGTHS[1]))
    short = run[-SHORTEST:]
    text = [*run, 1, 2, 3, *run, 4, 5, 6, 99, *short, 7, 8, 9, *run]
    assert propose(PromptLookup(), text, 5, 3) == Guess((4, 5, 6), grade=1)
    text[len(text) - len(run) :] = [98, *short]
    assert propose(PromptLookup(), text, 5, 3) == Guess((7, 8, 9), grade=0)


def test_a_repetition_that_has_just_begun_goes_on_past_the_end_of_the_text() -> None:
    text = [1, *([5, 6, 7] * 4)]
    assert propose(PromptLookup(), text, 3, 7).token_ids == (5, 6, 7, 5, 6, 7, 5)


def test_nothing_is_guessed_where_nothing_repeats_and_of_a_text_that_is_too_short() -> None:
    assert propose(PromptLookup(), list(range(3000)), 2000) == Guess()
    assert propose(PromptLookup(), [7] * SHORTEST, 1) == Guess()
    assert propose(PromptLookup(), [7] * (SHORTEST + 1), 1, 2) == Guess((7, 7))


def test_requests_do_not_find_each_others_text_and_one_that_ended_leaves_none() -> None:
    lookup, text = PromptLookup(), list(range(40))
    assert lookup.propose(A, text, text[:20], 3).token_ids == (20, 21, 22)
    assert lookup.propose(B, text[:20], [], 3) == Guess()
    lookup.forget(A)
    lookup.forget(RequestId("never seen"))
    assert lookup.propose(A, text[:20], [], 3) == Guess()


def test_runs_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lookup, "_MIXER", 0)
    text = [*range(1, 9), 50, *range(11, 19), 60, *range(1, 9)]
    assert propose(PromptLookup(), text, 3, 1).token_ids in ((), (50,))
