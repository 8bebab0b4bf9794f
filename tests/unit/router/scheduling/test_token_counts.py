"""Counts of a request's tokens, kept as it grows."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.router.scheduling.token_counts import TokenCounts

TOKENS = st.lists(st.integers(0, 300), max_size=400)


def counted(taken: bytes) -> dict[int, tuple[int, int]]:
    rows = np.frombuffer(taken, dtype=np.int32).reshape(-1, 3).tolist()
    assert len({row[0] for row in rows}) == len(rows), "a token stands there once"
    return {token_id: (times, in_prompt) for token_id, times, in_prompt in rows}


@given(TOKENS, TOKENS, st.lists(st.integers(0, 400), max_size=4))
def test_counts_kept_step_by_step_are_those_counted_anew(
    prompt: list[int], generated: list[int], looks: list[int]
) -> None:
    counts = TokenCounts(prompt)
    for length in sorted(min(look, len(generated)) for look in looks):
        counts.take(generated[:length])
    times = Counter(generated)
    wanted = {token_id: (times[token_id], int(token_id in prompt)) for token_id in {*prompt, *generated}}
    assert counted(counts.take(generated)) == wanted
    assert counts.take(generated) == TokenCounts(prompt).take(generated), "a request that is restored says the same"


def test_what_was_taken_does_not_change_afterwards() -> None:
    counts = TokenCounts([7])
    taken = counts.take([])
    counts.take([7, 8])
    assert counted(taken) == {7: (0, 1)}
