"""The bound refuses nothing that would fit, and is there for the tokenizers of the families that are served."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from services.router.front.text.token_bound import TokenBound
from tests.support.checkpoints.tiny_tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

TOKENIZERS = [byte_level_tokenizer(), byte_fallback_tokenizer()]
BOUNDS = list(map(TokenBound, TOKENIZERS))
# What shortens a text most: long tokens again and again, and characters that compose (U+1FA7 is made of four).
PIECES = st.one_of(
    st.sampled_from(
        ["experts", " experts", "</s>", "<|user|>", "e\u0301", "\u03c9\u0314\u0342\u0345", "\u1100\u1161\u11a8"]
    ),
    st.characters(exclude_categories=["Cs"]),  # a request that holds half a character is refused before
)


@pytest.mark.parametrize("number", [0, 1])
@given(st.lists(PIECES, max_size=8), st.integers(1, 40))
@settings(max_examples=150)
def test_no_text_makes_fewer_tokens_than_the_bound(number: int, pieces: list[str], repeats: int) -> None:
    text = "".join(pieces) * repeats
    assert BOUNDS[number].least_tokens(text) <= len(TOKENIZERS[number].encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("number", [0, 1])
def test_a_long_text_makes_many(number: int) -> None:
    longest = max(map(len, TOKENIZERS[number].get_vocab()))
    assert BOUNDS[number].least_tokens("a" * 1000 * longest) == 1000
    assert 0 < BOUNDS[number].least_tokens("é" * 1000 * longest) <= 1000


def changed(**parts: Any) -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def stripping(**flags: bool) -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<mask>", **flags)])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (changed(normalizer=normalizers.Strip()), "a" + " " * 9999),
        (
            changed(normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
            "a" + "\u0301" * 9999,
        ),
        (changed(normalizer=normalizers.Replace("ab", "")), "ab" * 9999),
        (changed(normalizer=normalizers.Replace("aaaaaaaaaaaaaaaaaaaa", "a")), "a" * 9999),
        (changed(pre_tokenizer=pre_tokenizers.Whitespace()), "a" + " " * 9999),
        (changed(pre_tokenizer=pre_tokenizers.Split("b", "removed")), "a" + "b" * 9999),
        (stripping(lstrip=True), " " * 9999 + "<mask>"),
        (stripping(rstrip=True), "<mask>" + " " * 9999),
        (Tokenizer(models.BPE({"a": 0}, [])), "a" + "b" * 9999),
        (Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True)), "b" * 9999),
        (Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), "b" * 9999),
        (Tokenizer(models.Unigram([("?", 0.0), ("a", -1.0)], unk_id=0)), "b" * 9999),
    ],
)
def test_where_a_tokenizer_may_lose_characters_nothing_is_said(tokenizer: Tokenizer, text: str) -> None:
    bound = TokenBound(tokenizer)
    assert bound.least_tokens("a" * 10**6) == 0
    assert bound.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)
