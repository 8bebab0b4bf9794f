"""Counts of a request's tokens, as its last stage is told them."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.router.scheduling.token_counts import count_tokens

TOKENS = st.lists(st.integers(0, 300), max_size=400)


@given(TOKENS, TOKENS)
def test_each_token_stands_there_once_with_how_often_it_was_generated(prompt: list[int], generated: list[int]) -> None:
    rows = np.frombuffer(count_tokens(prompt, generated), dtype=np.int32).reshape(-1, 3).tolist()
    times = Counter(generated)
    wanted = {token_id: (times[token_id], int(token_id in prompt)) for token_id in {*prompt, *generated}}
    assert {token_id: (count, in_prompt) for token_id, count, in_prompt in rows} == wanted
    assert len(rows) == len(wanted)
