from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from services.router.front.detokenizer import ByteLevelDetokenizer, WindowDetokenizer, create_detokenizer
from services.router.front.vocabulary import Vocabulary
from tests.support.tiny_tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

MANY_EXAMPLES = settings(max_examples=150, deadline=None)


def metaspace_tokenizer() -> Tokenizer:
    """Words with a mark for the space, by the decoder of that name."""
    vocabulary = {token: token_id for token_id, token in enumerate(("▁", "▁a", "b", "▁▁", "c▁", "d"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="d"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


TOKENIZERS = {
    "byte_level": byte_level_tokenizer(),
    "byte_fallback": byte_fallback_tokenizer(),
    "metaspace": metaspace_tokenizer(),
}
TOKENIZERS["byte_level"].add_tokens(["<note>", "größe"])
TOKENIZERS["byte_fallback"].add_tokens(["<note>"])
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
NAMES = sorted(TOKENIZERS)


def pieces_of(name: str, token_ids: list[int]) -> list[str]:
    detokenizer = create_detokenizer(VOCABULARIES[name])
    return [*[detokenizer.push(token_id) for token_id in token_ids], detokenizer.flush()]


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    # Some ids past the end: an embedding may have more rows than there are tokens.
    return st.lists(st.integers(0, TOKENIZERS[name].get_vocab_size() + 3), max_size=40)


@pytest.mark.parametrize("name", NAMES)
@MANY_EXAMPLES
@given(data=st.data())
def test_pieces_of_any_ids_make_what_decode_makes(name: str, data: st.DataObject) -> None:
    token_ids = data.draw(ids_of(name))
    assert "".join(pieces_of(name, token_ids)) == TOKENIZERS[name].decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte_fallback", "byte_level"])
@MANY_EXAMPLES
@given(text=st.text(max_size=30))
def test_pieces_of_a_text_never_hold_half_a_character(name: str, text: str) -> None:
    token_ids = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    pieces = pieces_of(name, token_ids)
    assert "".join(pieces) == TOKENIZERS[name].decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


@MANY_EXAMPLES
@given(st.lists(st.integers(3, 258), max_size=16), st.integers(259, 419))
def test_runs_of_fallback_bytes_are_valid_or_not_as_a_whole(byte_ids: list[int], word: int) -> None:
    token_ids = [word, *byte_ids, word, *byte_ids]
    assert "".join(pieces_of("byte_fallback", token_ids)) == TOKENIZERS["byte_fallback"].decode(token_ids)


def test_window_also_serves_a_byte_level_decoder_within_a_sequence() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    detokenizer = create_detokenizer(Vocabulary(tokenizer))
    assert isinstance(detokenizer, WindowDetokenizer)
    text = "Grüße 你好 👩‍🚀!"
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode(text).ids]
    assert "".join(pieces) + detokenizer.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_characters_come_out_as_soon_as_they_are_whole() -> None:
    detokenizer = create_detokenizer(VOCABULARIES["byte_level"])
    assert isinstance(detokenizer, ByteLevelDetokenizer)
    token_ids = TOKENIZERS["byte_level"].encode("é👩").ids
    shown = ""
    for position, token_id in enumerate(token_ids, start=1):
        shown += detokenizer.push(token_id)
        data = b"".join(VOCABULARIES["byte_level"].token_bytes(each) for each in token_ids[:position])
        assert shown == data.decode(errors="ignore")


@pytest.mark.parametrize("token", ["▁", "<0xE2>", "<0x41>"])
def test_a_loop_of_one_token_costs_linear_time(token: str) -> None:
    vocabulary = VOCABULARIES["byte_fallback"]
    token_id = TOKENIZERS["byte_fallback"].token_to_id(token)
    assert token_id is not None
    calls: list[int] = []

    class CountingVocabulary(Vocabulary):
        def decode(self, token_ids: list[int]) -> str:  # type: ignore[override]
            calls.append(len(token_ids))
            return super().decode(token_ids)

    counting = CountingVocabulary(TOKENIZERS["byte_fallback"])
    detokenizer = create_detokenizer(counting)
    for _ in range(3000):
        detokenizer.push(token_id)
    detokenizer.flush()
    assert sum(calls) <= 3000 * 20
    assert vocabulary.has_byte_fallback
