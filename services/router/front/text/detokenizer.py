"""Token ids to text: what each stands for by itself, and what they make together, piece by piece.

The pieces together are what `Tokenizer.decode`, given prompt and answer at once, adds to the text of the prompt.

That promise decides the method:
- Decoders strip or join at the start of a text, and a prompt may end within a character: so the prompt's last tokens
  are read first, and what they make is not shown.
- A byte-level vocabulary maps each token to bytes, whatever its neighbours are; an incremental UTF-8 decoder does
  the rest.
- With byte fallback, a character that lacks a token comes as a run of byte tokens. It is shown with its last byte, and
  a byte that belongs to no character is one U+FFFD, as SentencePiece itself decodes. Here the promise has an exception:
  of a run with a fault in it the `tokenizers` library makes U+FFFD of every byte, also of those of whole characters.
  While a run goes on it is not known whether a fault will come, nothing that was shown is taken back, and a line break
  after a fault is still one, which a client may have named as a stop string.
- Otherwise text is decoded in a window over the last few tokens.
Work and memory are linear in the number of tokens.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tokenizers import Tokenizer

from common.errors import ExecutionError

_PANIC = "PanicException"
"""Its module cannot be imported."""
_PREFIX_TOKENS = 6
"""Tokens kept before new ones, so that what a decoder does to the start of a text happens to them."""
_REPLACEMENT = "\ufffd"
_MAX_UTF8_BYTES = 4
_LOOK_BACK = 1024
"""How many tokens of a prompt are looked at: each choice and each reader of it begins with them."""


class _PanicsAreErrors:
    """Turns panics of the tokenizers library into errors. It is a class, since a generator would cost more than what it
    guards.

    Its Rust code panics where a checkpoint brings it into a corner (a decoder that strips the end of a token without
    text, for one). Python gets that as a BaseException that is not an `Exception`: it passes all that ends a failed
    request, and the client would wait for ever.
    """

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and kind.__name__ == _PANIC:
            raise ExecutionError(f"the tokenizer of this checkpoint failed: {error}") from error


panics_are_errors = _PanicsAreErrors()
"""A context in which a panic becomes an ExecutionError."""


class Vocabulary:
    """Says what single tokens stand for. Answers are kept, since the same few thousand tokens make most of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoders = parts_of(json.loads(tokenizer.to_str(pretty=False)).get("decoder"), "decoders")
        kinds = [decoder["type"] for decoder in decoders]
        self.is_byte_level = kinds == ["ByteLevel"]
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
        """Says whether it is a special token, or an id without a token, as embeddings padded to a round size have."""
        skipped = self._skipped.get(token_id)
        if skipped is None:
            token = self._tokenizer.id_to_token(token_id)
            skipped = self._skipped[token_id] = token is None or token in self._special_texts
        return skipped

    def special_id(self, text: str) -> int | None:
        """Returns the id of the special token that is written so; None if there is none."""
        return self._tokenizer.token_to_id(text) if text in self._special_texts else None

    def is_fallback_byte(self, token_id: int) -> bool:
        """Says whether the token is one byte of a character that the vocabulary lacks."""
        return token_id in self._fallback_bytes

    def token_bytes(self, token_id: int) -> bytes:
        """Returns what the token adds to a text: UTF-8, perhaps a part of a character; special tokens as they are
        written."""
        value = self._bytes.get(token_id)
        if value is None:
            value = self._bytes[token_id] = self._make_bytes(token_id)
        return value

    def token_text(self, token_id: int) -> str:
        """Returns the token as log-probabilities show it. Bytes that make no character are written out, as OpenAI does
        it: two parts of characters read alike only if they are alike."""
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    def is_text(self, token_id: int) -> bool:
        """Says whether it is made of whole characters."""
        value = self.token_bytes(token_id)
        return value.decode("utf-8", "ignore").encode() == value

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of all of them."""
        with panics_are_errors:
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def _make_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            # The decoder itself falls back to the token's own characters if one of them stands for no byte.
            values = [self._byte_of_character.get(character) for character in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if token_id in self._fallback_bytes:
            return bytes([self._fallback_bytes[token_id]])
        return (token.replace("\u2581", " ") if self._is_metaspace else token).encode()


def parts_of(component: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """Returns the parts of a component of tokenizer.json in order; one that has several has them under `name`."""
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [part for inner in component[name] for part in parts_of(inner, name)]
    return [component]


def _fallback_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """Maps token ids to bytes. The library's decoder knows both cases of hexadecimal digits."""
    found: dict[int, int] = {}
    for value in range(256):
        for token in (f"<0x{value:02X}>", f"<0x{value:02x}>"):
            token_id = tokenizer.token_to_id(token)
            if token_id is not None:
                found[token_id] = value
    return found


def _byte_of_character() -> dict[str, int]:
    """Inverts GPT-2's table: printable Latin-1 bytes stand for themselves, others for characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(value): value for value in printable}
    others = [value for value in range(256) if chr(value) not in table]
    table.update({chr(0x100 + position): value for position, value in enumerate(others)})
    return table


def create_detokenizer(
    vocabulary: Vocabulary, prompt_token_ids: Sequence[int] = ()
) -> ByteLevelDetokenizer | WindowDetokenizer:
    """Returns what makes the text of one choice, as it suits the vocabulary's decoder, ready for what follows the
    prompt."""
    detokenizer = ByteLevelDetokenizer(vocabulary) if vocabulary.is_byte_level else WindowDetokenizer(vocabulary)
    for token_id in _last_tokens(vocabulary, prompt_token_ids):
        detokenizer.push(token_id)
    return detokenizer


def begun_character(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[int]:
    """Returns the byte tokens at the end that begin a character and do not finish it."""
    shown = [token_id for token_id in token_ids[-_LOOK_BACK:] if not vocabulary.is_skipped(token_id)]
    for length in range(1, min(_MAX_UTF8_BYTES, len(shown) + 1)):
        if not vocabulary.is_fallback_byte(shown[-length]):
            break
        begun = shown[-length:]
        if _has_begun(b"".join(map(vocabulary.token_bytes, begun))):
            return begun
    return []


def _has_begun(data: bytes) -> bool:
    """Says whether these bytes are the beginning of a character's."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


def _last_tokens(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[int]:
    """Returns the tokens that decide how the next one reads: a few that show in the text, and a character that has
    begun."""
    shown = [token_id for token_id in token_ids[-_LOOK_BACK:] if not vocabulary.is_skipped(token_id)]
    return shown[-_PREFIX_TOKENS - len(begun_character(vocabulary, token_ids)) :]


class ByteLevelDetokenizer:
    """Serves the byte-level BPE of GPT-2, Llama 3, Qwen."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        # Python's "replace" and Rust's lossy decoding agree: one U+FFFD for each maximal invalid part.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Returns the text that this token makes certain; often "", never half a character."""
        if self._vocabulary.is_skipped(token_id):
            return ""
        return self._decoder.decode(self._vocabulary.token_bytes(token_id))

    def flush(self) -> str:
        """Returns the rest, when no more tokens come."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Serves sentencepiece-like vocabularies with byte fallback (Llama 2, Mixtral) and any other decoder."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []
        self._num_shown_tokens = 0
        """How many tokens of the window, from the first on, are shown."""
        self._shown_text = ""
        """What they decode to on their own."""
        self._bytes: list[int] = []
        """The tokens of the character that has begun."""

    def push(self, token_id: int) -> str:
        """Returns the text that this token makes certain; often "", never half a character."""
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
        """Returns the rest, when no more tokens come."""
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
        """Shows the first `number` bytes as faults: they make no character."""
        if number:
            self._bytes = self._bytes[number:]
            # Whatever comes next is not decoded together with them, which would make faults of it too.
            self._window = list(self._vocabulary.neutral_byte)
            self._shown_text = self._vocabulary.decode(self._window)
            self._num_shown_tokens = len(self._window)
        return _REPLACEMENT * number

    def _show(self, text: str, prefix: list[int]) -> str:
        """Returns the new part of what the window decodes to; of its tokens, `prefix` is kept."""
        piece = text[len(self._shown_text) :]
        prefix_text = self._vocabulary.decode(prefix)
        # A prefix of no text would let the decoder strip the space off the next token.
        if prefix_text:
            self._window, self._shown_text = prefix, prefix_text
        else:
            self._shown_text = text
        self._num_shown_tokens = len(self._window)
        return piece
