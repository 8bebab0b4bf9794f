"""Token ids to text, piece by piece. The pieces together are what `Tokenizer.decode`, given prompt and answer at once,
adds to the text of the prompt.

That promise decides the method:
- Decoders strip or join at the start of a text, and a prompt may end within a character: so the prompt's last tokens
  are read first, and what they make is not shown.
- A byte-level vocabulary maps each token to bytes, whatever its neighbours are; an incremental UTF-8 decoder does
  the rest.
- With byte fallback, a character that lacks a token comes as a run of byte tokens. It is shown with its last byte, and
  a byte that belongs to no character is one U+FFFD, as SentencePiece itself decodes. Here the promise has an exception:
  of a run with a fault in it the `tokenizers` library makes U+FFFD of every byte, also of those of whole characters.
  While a run goes on nobody knows whether a fault will come, nothing that was shown is taken back, and a line break
  after a fault is still one, which a client may have named as a stop string.
- Otherwise text is decoded in a window over the last few tokens.
Work and memory are linear in the number of tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from services.router.front.text.vocabulary import DecoderKind, Vocabulary

_PREFIX_TOKENS = 6
"""Tokens kept before new ones, so that what a decoder does to the start of a text happens to them."""
_REPLACEMENT = "\ufffd"
_MAX_UTF8_BYTES = 4
_LOOK_BACK = 1024
"""Tokens of a prompt that are looked at: each choice and each reader of it begins with them."""


class Detokenizer(Protocol):
    """Of one choice."""

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; often "", never half a character."""
        ...

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        ...


def create_detokenizer(vocabulary: Vocabulary, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
    """The method that suits the vocabulary's decoder, ready for what follows the prompt."""
    is_byte_level = vocabulary.decoder_kind is DecoderKind.BYTE_LEVEL
    detokenizer = ByteLevelDetokenizer(vocabulary) if is_byte_level else WindowDetokenizer(vocabulary)
    for token_id in _last_tokens(vocabulary, prompt_token_ids):
        detokenizer.push(token_id)
    return detokenizer


def begun_character(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[int]:
    """The byte tokens at the end that begin a character and do not finish it."""
    shown = [token_id for token_id in token_ids[-_LOOK_BACK:] if not vocabulary.is_skipped(token_id)]
    for length in range(1, min(_MAX_UTF8_BYTES, len(shown) + 1)):
        if not vocabulary.is_fallback_byte(shown[-length]):
            break
        begun = shown[-length:]
        if _has_begun(b"".join(map(vocabulary.token_bytes, begun))):
            return begun
    return []


def _has_begun(data: bytes) -> bool:
    """True for the beginning of a character's bytes."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


def _last_tokens(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[int]:
    """Tokens that decide how the next one reads: a few that show in the text, and a character that has begun."""
    shown = [token_id for token_id in token_ids[-_LOOK_BACK:] if not vocabulary.is_skipped(token_id)]
    return shown[-_PREFIX_TOKENS - len(begun_character(vocabulary, token_ids)) :]


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
        self._bytes: list[int] = []
        """Tokens of the character that has begun."""

    def push(self, token_id: int) -> str:
        if self._vocabulary.is_skipped(token_id):
            return ""
        if self._vocabulary.is_fallback_byte(token_id):
            return self._push_byte(token_id)
        lost = self._give_up_bytes(len(self._bytes))
        self._window.append(token_id)
        text = self._vocabulary.decode(self._window)
        num_new_tokens = len(self._window) - self._num_shown_tokens
        if text.endswith(_REPLACEMENT) and num_new_tokens < _MAX_UTF8_BYTES and not self._vocabulary.has_byte_fallback:
            return ""  # a decoder of another kind may be in the middle of a character
        return lost + self._show(text, self._window[-_PREFIX_TOKENS:])

    def flush(self) -> str:
        lost = self._give_up_bytes(len(self._bytes))
        if len(self._window) == self._num_shown_tokens:
            return lost
        return lost + self._show(self._vocabulary.decode(self._window), self._window[-_PREFIX_TOKENS:])

    def _push_byte(self, token_id: int) -> str:
        self._bytes.append(token_id)
        shown = ""
        while self._bytes:
            try:
                b"".join(map(self._vocabulary.token_bytes, self._bytes)).decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                shown += self._give_up_bytes(1)
                continue
            character, self._bytes = self._bytes, []
            self._window += character
            # Of a run that goes on, a part that begins within a character would be decoded as faulty.
            shown += self._show(self._vocabulary.decode(self._window), character)
        return shown

    def _give_up_bytes(self, number: int) -> str:
        """The first so many make no character."""
        if number:
            self._bytes = self._bytes[number:]
            # Whatever comes next is not decoded together with them, which would make faults of it too.
            self._window = list(self._vocabulary.neutral_byte)
            self._shown_text = self._vocabulary.decode(self._window)
            self._num_shown_tokens = len(self._window)
        return _REPLACEMENT * number

    def _show(self, text: str, prefix: list[int]) -> str:
        """The new part of what the window decodes to; of its tokens, `prefix` is kept."""
        piece = text[len(self._shown_text) :]
        prefix_text = self._vocabulary.decode(prefix)
        # A prefix of no text would let the decoder strip the space off the next token.
        if prefix_text:
            self._window, self._shown_text = prefix, prefix_text
        else:
            self._shown_text = text
        self._num_shown_tokens = len(self._window)
        return piece
