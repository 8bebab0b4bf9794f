"""Token ids to text, piece by piece. The pieces together are what `Tokenizer.decode`, given prompt and answer at once,
adds to the text of the prompt.

That promise decides the method:
- Decoders strip or join at the start of a text, and a prompt may end within a character: so the prompt's last tokens
  are read first, and what they make is not shown.
- A byte-level vocabulary maps each token to bytes, whatever its neighbours are; an incremental UTF-8 decoder does
  the rest.
- With byte fallback, a character that lacks a token comes as a run of byte tokens. It is shown with its last byte.
  Here the promise has one exception: of a run that is not valid UTF-8 the library makes U+FFFD of every byte, also of
  the characters before the fault. Those were shown, and nothing that was shown is taken back; all bytes from the fault
  to the end of the run become U+FFFD, one each.
- Otherwise text is decoded in a window over the last few tokens.
Work and memory are linear in the number of tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from services.router.front.vocabulary import DecoderKind, Vocabulary

_PREFIX_TOKENS = 6
"""Tokens kept before new ones, so that what a decoder does to the start of a text happens to them."""
_REPLACEMENT = "\ufffd"
_MAX_UTF8_BYTES = 4
_CONTINUING_BYTES = bytes(range(0x80, 0xC0))
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


def _last_tokens(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[int]:
    """Tokens that decide how the next one reads: a few that show in the text, and of a run of bytes that it ends in
    what says whether the run is whole, has begun a character, or is faulty."""
    shown = [token_id for token_id in token_ids[-_LOOK_BACK:] if not vocabulary.is_skipped(token_id)]
    start = len(shown)
    while start and vocabulary.is_fallback_byte(shown[start - 1]):
        start -= 1
    is_cut = start == 0 and len(token_ids) > _LOOK_BACK
    return shown[:start][-_PREFIX_TOKENS:] + _end_of_run(vocabulary, shown[start:], is_cut)


def _end_of_run(vocabulary: Vocabulary, run: list[int], is_cut: bool) -> list[int]:
    data = b"".join(map(vocabulary.token_bytes, run))
    if is_cut:  # perhaps within a character
        data = data.lstrip(_CONTINUING_BYTES)
        run = run[len(run) - len(data) :]
    whole = len(data)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return run[error.start : error.start + _MAX_UTF8_BYTES] + run[-1:]
        whole = error.start
    last = max(0, whole - 1)
    while last and data[last] in _CONTINUING_BYTES:
        last -= 1
    return run[last:]


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
        self._is_faulty = False
        """The run of bytes that goes on is not valid UTF-8."""

    def push(self, token_id: int) -> str:
        if self._vocabulary.is_skipped(token_id):
            return ""
        if self._vocabulary.is_fallback_byte(token_id):
            return self._push_byte(token_id)
        lost = self._give_up_bytes()
        self._is_faulty = False
        self._window.append(token_id)
        text = self._vocabulary.decode(self._window)
        num_new_tokens = len(self._window) - self._num_shown_tokens
        if text.endswith(_REPLACEMENT) and num_new_tokens < _MAX_UTF8_BYTES and not self._vocabulary.has_byte_fallback:
            return ""  # a decoder of another kind may be in the middle of a character
        return lost + self._show(text, self._window[-_PREFIX_TOKENS:])

    def flush(self) -> str:
        lost = self._give_up_bytes()
        if len(self._window) == self._num_shown_tokens:
            return lost
        return lost + self._show(self._vocabulary.decode(self._window), self._window[-_PREFIX_TOKENS:])

    def _push_byte(self, token_id: int) -> str:
        self._bytes.append(token_id)
        if self._is_faulty:
            return self._give_up_bytes()
        try:
            b"".join(map(self._vocabulary.token_bytes, self._bytes)).decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            self._is_faulty = True
            return self._give_up_bytes()
        character, self._bytes = self._bytes, []
        self._window += character
        # Of a run that goes on, a part that begins within a character would be decoded as faulty.
        return self._show(self._vocabulary.decode(self._window), character)

    def _give_up_bytes(self) -> str:
        """They make no character."""
        lost = self._bytes
        if lost:
            self._bytes = []
            # What is before them is not decoded together with them any more: it was shown, and would be lost too.
            self._window, self._shown_text = lost, self._vocabulary.decode(lost)
            self._num_shown_tokens = len(lost)
        return _REPLACEMENT * len(lost)

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
