"""Tokens on their way to the journal and back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.router.engine import FinishReason, RecoveryCounts, Token
from services.router.journal.records import decode_tokens, encode_tokens

COUNTS = st.integers(0, 1 << 40)
TOKENS = st.builds(
    Token,
    COUNTS,
    st.none() | st.floats(allow_nan=False),
    st.lists(st.tuples(COUNTS, st.floats(allow_nan=False)), max_size=3).map(tuple),
    st.none() | st.sampled_from(FinishReason),
    st.booleans(),
    st.none() | st.builds(RecoveryCounts, COUNTS, COUNTS, COUNTS),
    COUNTS,
    st.booleans(),
    COUNTS,
)


@given(st.lists(TOKENS, max_size=5))
def test_a_token_comes_back_as_it_was(tokens: list[Token]) -> None:
    assert decode_tokens(encode_tokens(tokens)) == tokens
