"""Token ids to text, piece by piece. The pieces together are what `Tokenizer.decode` makes of all ids at once.

That promise decides the method:
- A byte-level vocabulary maps each token to bytes, whatever its neighbours are; an incremental UTF-8 decoder does
  the rest.
- With byte fallback, a run of byte tokens is one unit: if it is not valid UTF-8 as a whole, each byte of it becomes
  U+FFFD. So a run is held back until a token ends it, and a character that was shown is never taken back.
- Otherwise text is decoded in a window over the last few tokens, since decoders strip or join at the start of a text.
Work and memory are linear in the number of tokens.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from services.router.front.vocabulary import DecoderKind, Vocabulary

_PREFIX_TOKENS = 6
"""Tokens kept before new ones, so that what a decoder does to the start of a text happens to them."""
_REPLACEMENT = "\ufffd"
_MAX_UTF8_BYTES = 4


class Detokenizer(Protocol):
    """Of one choice."""

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; often "", never half a character."""
        ...

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        ...


def create_detokenizer(vocabulary: Vocabulary) -> Detokenizer:
    """The method that suits the vocabulary's decoder."""
    if vocabulary.decoder_kind is DecoderKind.BYTE_LEVEL:
        return ByteLevelDetokenizer(vocabulary)
    return WindowDetokenizer(vocabulary)


class ByteLevelDetokenizer:
    """For the byte-level BPE of GPT-2, Llama 3, Qwen."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        # Python's "replace" and Rust's lossy decoding agree: one U+FFFD for each maximal invalid part.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if self._vocabulary.is_skipped(token_id):
            return ""
        return self._decoder.decode(self._vocabulary.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For sentencepiece-like vocabularies with byte fallback (Llama 2, Mixtral) and any other decoder."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []
        self._num_shown_tokens = 0
        """The first so many tokens of the window are shown."""
        self._shown_text = ""
        """What they decode to on their own."""

    def push(self, token_id: int) -> str:
        if self._vocabulary.is_skipped(token_id):
            return ""
        self._window.append(token_id)
        if self._vocabulary.is_fallback_byte(token_id):
            return ""
        text = self._vocabulary.decode(self._window)
        num_new_tokens = len(self._window) - self._num_shown_tokens
        if text.endswith(_REPLACEMENT) and num_new_tokens < _MAX_UTF8_BYTES and not self._vocabulary.has_byte_fallback:
            return ""  # a decoder of another kind may be in the middle of a character
        return self._show(text)

    def flush(self) -> str:
        if len(self._window) == self._num_shown_tokens:
            return ""
        return self._show(self._vocabulary.decode(self._window))

    def _show(self, text: str) -> str:
        piece = text[len(self._shown_text) :]
        prefix = self._window[-_PREFIX_TOKENS:]
        prefix_text = self._vocabulary.decode(prefix)
        # A prefix of no text would let the decoder strip the space off the next token.
        if prefix_text:
            self._window, self._shown_text = prefix, prefix_text
        else:
            self._shown_text = text
        self._num_shown_tokens = len(self._window)
        return piece
