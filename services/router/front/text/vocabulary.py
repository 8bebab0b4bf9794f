"""What single token ids stand for: bytes, skipped or not, byte fallback or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from typing import Any

from tokenizers import Tokenizer

from services.router.front.text.library_panics import panics_are_errors


class DecoderKind(Enum):
    """How text comes out of tokens."""

    BYTE_LEVEL = "byte level"
    OTHER = "other"


class Vocabulary:
    """Answers about ids are kept, since the same few thousand tokens make most of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoders = _decoders(json.loads(tokenizer.to_str(pretty=False)).get("decoder"))
        kinds = [decoder["type"] for decoder in decoders]
        self.decoder_kind = DecoderKind.BYTE_LEVEL if kinds == ["ByteLevel"] else DecoderKind.OTHER
        self.has_byte_fallback = "ByteFallback" in kinds
        self._is_metaspace = "Metaspace" in kinds or any(
            decoder["type"] == "Replace" and decoder.get("pattern") == {"String": "\u2581"} for decoder in decoders
        )
        added = tokenizer.get_added_tokens_decoder()
        self._special_texts = {token.content for token in added.values() if token.special}
        self._fallback_bytes = _fallback_bytes(tokenizer) if self.has_byte_fallback else {}
        self.neutral_byte = [token_id for token_id, value in self._fallback_bytes.items() if value == ord("A")][:1]
        """A token that is a letter, and so stands for any text before another byte; none in a vocabulary without it."""
        self._skipped: dict[int, bool] = {}
        self._bytes: dict[int, bytes] = {}
        self._byte_of_character = _byte_of_character()

    def is_skipped(self, token_id: int) -> bool:
        """True for special tokens, and for ids without a token (an embedding padded to a round size has such)."""
        skipped = self._skipped.get(token_id)
        if skipped is None:
            token = self._tokenizer.id_to_token(token_id)
            skipped = self._skipped[token_id] = token is None or token in self._special_texts
        return skipped

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written so; None if there is none."""
        return self._tokenizer.token_to_id(text) if text in self._special_texts else None

    def is_fallback_byte(self, token_id: int) -> bool:
        """True if the token is one byte of a character that the vocabulary lacks."""
        return token_id in self._fallback_bytes

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text: UTF-8, perhaps a part of a character; special tokens as they are written."""
        value = self._bytes.get(token_id)
        if value is None:
            value = self._bytes[token_id] = self._make_bytes(token_id)
        return value

    def token_text(self, token_id: int) -> str:
        """The token as log-probabilities show it. Bytes that make no character are written out, as OpenAI does it: two
        parts of characters read alike only if they are alike."""
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    def is_text(self, token_id: int) -> bool:
        """True if it is made of whole characters."""
        value = self.token_bytes(token_id)
        return value.decode("utf-8", "ignore").encode() == value

    def decode(self, token_ids: Sequence[int]) -> str:
        """Special tokens are left out."""
        with panics_are_errors:
            return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _make_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.decoder_kind is DecoderKind.BYTE_LEVEL:
            # The decoder itself falls back to the token's own characters if one of them stands for no byte.
            values = [self._byte_of_character.get(character) for character in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if token_id in self._fallback_bytes:
            return bytes([self._fallback_bytes[token_id]])
        return (token.replace("\u2581", " ") if self._is_metaspace else token).encode()


def _decoders(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoder's parts in order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for child in decoder["decoders"] for part in _decoders(child)]
    return [decoder]


def _fallback_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """Token id -> byte. The library's decoder takes both cases of hexadecimal digits."""
    found: dict[int, int] = {}
    for value in range(256):
        for token in (f"<0x{value:02X}>", f"<0x{value:02x}>"):
            token_id = tokenizer.token_to_id(token)
            if token_id is not None:
                found[token_id] = value
    return found


def _byte_of_character() -> dict[str, int]:
    """The inverse of GPT-2's table: printable Latin-1 bytes stand for themselves, others for characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(value): value for value in printable}
    others = [value for value in range(256) if chr(value) not in table]
    table.update({chr(0x100 + position): value for position, value in enumerate(others)})
    return table
