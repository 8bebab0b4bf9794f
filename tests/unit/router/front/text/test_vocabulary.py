from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from services.router.front.text.vocabulary import DecoderKind, Vocabulary
from tests.support.checkpoints.tiny_tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

TEXT = "The quick brown fox, 你好 👩‍🚀!"


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), byte_fallback_tokenizer()], ids=["level", "fallback"])
def test_bytes_of_the_tokens_of_a_text_are_the_texts(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert b"".join(vocabulary.token_bytes(token_id) for token_id in token_ids).decode().lstrip() == TEXT


def test_kind_is_read_off_the_decoder() -> None:
    assert Vocabulary(byte_level_tokenizer()).decoder_kind is DecoderKind.BYTE_LEVEL
    assert Vocabulary(byte_fallback_tokenizer()).decoder_kind is DecoderKind.OTHER


def test_only_special_tokens_and_ids_without_a_token_are_skipped() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<note>"])
    vocabulary = Vocabulary(tokenizer)
    note = tokenizer.token_to_id("<note>")
    assert note is not None
    assert [vocabulary.is_skipped(token_id) for token_id in (2, 50, note, note + 1)] == [True, False, False, True]


def test_a_byte_is_a_byte_only_with_byte_fallback() -> None:
    fallback = Vocabulary(byte_fallback_tokenizer())
    assert fallback.is_fallback_byte(3 + 0xE2)
    assert fallback.token_bytes(3 + 0xE2) == b"\xe2"
    assert not fallback.is_fallback_byte(300)
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<0xE2>"])
    token_id = tokenizer.token_to_id("<0xE2>")
    assert token_id is not None
    level = Vocabulary(tokenizer)
    assert not level.is_fallback_byte(token_id)
    assert level.token_bytes(token_id) == b"<0xE2>"


def test_special_tokens_show_as_they_are_written() -> None:
    for tokenizer in (byte_level_tokenizer(), byte_fallback_tokenizer()):
        assert Vocabulary(tokenizer).token_text(2) == "</s>"
