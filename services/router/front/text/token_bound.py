"""How few tokens a text can make, told from its length: what cannot fit is refused before it is tokenized.

Tokenizing takes about 250 bytes and a microsecond a token, so 8 MB of text cost gigabytes before their tokens could be
counted. The bound holds for tokenizers whose parts are known to lose no character; others get none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from services.router.front.text.detokenizer import parts_of

_COMPOSED_CHARACTERS = 4
"""Most characters that normalization form C makes one of: no canonical decomposition is longer (Unicode, UAX 15)."""


class TokenBound:
    """Knows how few tokens one tokenizer makes of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        parts: Mapping[str, Any] = json.loads(tokenizer.to_str(pretty=False))
        normalizers = parts_of(parts["normalizer"], "normalizers")
        splitters = parts_of(parts["pre_tokenizer"], "pretokenizers")
        self._is_known = (
            all(map(_normalizes_without_loss, normalizers))
            and all(map(_splits_without_loss, splitters))
            and _has_a_token_for_everything(parts["model"], [*normalizers, *splitters])
            # These take any number of spaces with them.
            and not any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"])
        )
        self._shrinking = _COMPOSED_CHARACTERS ** sum(part["type"] in ("NFC", "NFKC") for part in normalizers)
        added = [token["content"] for token in parts["added_tokens"]]
        if tokenizer.normalizer is not None:
            added += [tokenizer.normalizer.normalize_str(content) for content in added.copy()]
        # In a byte-level vocabulary a character stands for a byte, of which a character of a text has at least one.
        self._characters_a_token = max(map(len, [*tokenizer.get_vocab(), *added]), default=0)

    def least_tokens(self, text: str) -> int:
        """Returns a number that no encoding of `text` falls below; 0 where nothing can be said."""
        if not self._is_known or not self._characters_a_token:
            return 0
        # Nothing composes in ASCII.
        shrinking = 1 if text.isascii() else self._shrinking
        return -(-len(text) // (self._characters_a_token * shrinking))


def _normalizes_without_loss(part: Mapping[str, Any]) -> bool:
    """Says whether no character goes but by composing, and no ASCII becomes something that composes."""
    match part["type"]:
        case "NFC" | "NFKC" | "NFD" | "NFKD" | "Lowercase" | "ByteLevel":
            return True
        case "Prepend":
            return _composes_with_nothing(part["prepend"])
        case "Replace":
            replaced = part["pattern"].get("String")
            return (
                replaced is not None
                and len(replaced) <= len(part["content"])
                and _composes_with_nothing(part["content"])
            )
    return False


def _composes_with_nothing(text: str) -> bool:
    return text.replace("\u2581", "_").isascii()


def _splits_without_loss(part: Mapping[str, Any]) -> bool:
    match part["type"]:
        case "ByteLevel" | "Metaspace" | "Digits" | "UnicodeScripts":
            return True
        case "Split" | "Punctuation":
            return bool(part["behavior"] != "Removed")
    return False


def _has_a_token_for_everything(model: Mapping[str, Any], parts: list[Mapping[str, Any]]) -> bool:
    """Says whether no run of unknown characters becomes one token, or none."""
    if model["type"] == "Unigram":
        vocabulary = {token for token, _ in model["vocab"]}
        return bool(model.get("byte_fallback")) and vocabulary.issuperset(_fallback_tokens())
    if model["type"] != "BPE":
        return False
    vocabulary = set(model["vocab"])
    if any(part["type"] == "ByteLevel" for part in parts):
        return vocabulary.issuperset(pre_tokenizers.ByteLevel.alphabet())
    if model.get("byte_fallback") and vocabulary.issuperset(_fallback_tokens()):
        return True
    return model.get("unk_token") in vocabulary and not model.get("fuse_unk")


def _fallback_tokens() -> set[str]:
    return {f"<0x{value:02X}>" for value in range(256)}
