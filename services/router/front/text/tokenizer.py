"""Text to token ids and back, from a Hugging Face directory: as transformers' AutoTokenizer does it, without it.

The tokens that a checkpoint names or adds beside those of `tokenizer.json` follow the rules of transformers 5. Names
(`bos_token`, ..., and any other `..._token`, such as `image_token`) are what a chat template may write. All that is
named or added is found in texts as one token; what is special does not show in answers. `tokenizer_class` is not looked
at: a published `tokenizer.json` says all that such a class would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from common.errors import CheckpointError, InvalidRequestError
from services.router.front.text.chat_template import ChatTemplate, Message
from services.router.front.text.checkpoint_file import CheckpointDefaults, CheckpointFile, read_checkpoint_defaults
from services.router.front.text.detokenizer import (
    Vocabulary,
    begun_character,
    create_detokenizer,
    panics_are_errors,
)
from services.router.front.text.token_bound import TokenBound

_STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_SHOWN_CHARACTERS = 300
"""How much is shown of what the library says against a file, which may hold a good part of it."""


class TextTokenizer:
    """Turns text into token ids and back. It is thread-safe: encoding may run in any thread."""

    def __init__(
        self, tokenizer: Tokenizer, chat_templates: Mapping[str, ChatTemplate], defaults: CheckpointDefaults
    ) -> None:
        """`chat_templates` are by name; the one named "default" is used. The tokenizer must not change after this."""
        self._tokenizer = tokenizer
        self._chat_templates = dict(chat_templates)
        self.defaults = defaults
        self.vocabulary = Vocabulary(tokenizer)
        self.bound = TokenBound(tokenizer)

    @classmethod
    def from_directory(cls, directory: Path) -> TextTokenizer:
        """Reads the tokenizer's files. Raises CheckpointError, which names the file."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} has no tokenizer.json")
        with _errors_of_the_library("read"):
            tokenizer = Tokenizer.from_file(str(path))
        config = CheckpointFile.read(directory, "tokenizer_config.json")
        tokens = read_special_tokens(directory, config, tokenizer)
        _complete(tokenizer, config, tokens)
        sources = _template_sources(directory, config)
        templates = {name: _compiled(place, text, tokens) for name, (place, text) in sources.items()}
        ends = (tokenizer.token_to_id(token.content) for token in tokens.named.get("eos_token", []))
        return cls(
            tokenizer,
            templates,
            read_checkpoint_defaults(directory, [token_id for token_id in ends if token_id is not None]),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a plain prompt; releases the interpreter's lock while it works."""
        # `encode` would keep the lock, and with it the event loop, for the whole of a long prompt.
        with panics_are_errors:
            encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encodings[0].ids
        return ids

    def render_chat(
        self, messages: Sequence[Message], template_arguments: Mapping[str, Any], now: datetime | None = None
    ) -> str:
        """Returns the text of a chat, up to where the assistant's turn begins; `now` is the date that a template sees.
        The template writes special tokens itself: encode it without.

        Raises InvalidRequestError if there is no chat template or it refuses the messages.
        """
        template = self._chat_templates.get("default")
        if template is None:
            names = ", ".join(sorted(self._chat_templates))
            reason = f"has no default one among its chat templates ({names})" if names else "has no chat template"
            raise InvalidRequestError(f"this model {reason}; use /v1/completions", "messages")
        return template.render(messages, template_arguments, now)

    def echo(self, prompt_token_ids: Sequence[int]) -> str:
        """Returns a prompt as text to which the text of a choice can be added: without a last character that has only
        begun."""
        begun = begun_character(self.vocabulary, prompt_token_ids)
        if begun and list(prompt_token_ids[-len(begun) :]) == begun:
            # The library would take whole characters before these for faults as well.
            return self.vocabulary.decode(prompt_token_ids[: -len(begun)], skip_special_tokens=False)
        text = self.vocabulary.decode(prompt_token_ids, skip_special_tokens=False)
        return text.removesuffix(create_detokenizer(self.vocabulary, prompt_token_ids).flush())


def _complete(tokenizer: Tokenizer, config: CheckpointFile, tokens: SpecialTokens) -> None:
    """Makes the tokenizer of tokenizer.json the one that transformers makes of it.

    `add_bos_token` and `add_eos_token` of tokenizer_config.json are not looked at: transformers drops them where there
    is a tokenizer.json, whose post-processor says it better.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = config.flag("split_special_tokens")
    if tokenizer.post_processor is None:
        tokenizer.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    tokens.add_to(tokenizer)
    with _errors_of_the_library("used"):
        tokenizer.decode(tokenizer.encode("a b").ids)


@contextmanager
def _errors_of_the_library(done: str) -> Iterator[None]:
    """Raises them as CheckpointError. The library raises Exception itself, and panics at some of what it has read
    before."""
    try:
        with panics_are_errors:
            yield
    except Exception as error:
        raise CheckpointError(f"tokenizer.json cannot be {done}: {str(error)[:_SHOWN_CHARACTERS]}") from error


def _compiled(place: str, source: str, tokens: SpecialTokens) -> ChatTemplate:
    try:
        return ChatTemplate(source, tokens.texts)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error.message}") from error


def _template_sources(directory: Path, config: CheckpointFile) -> dict[str, tuple[str, str]]:
    """Returns (place, text) of templates by name, where the place is a file, or a file and a key. Files count before
    entries of tokenizer_config.json."""
    sources = {path.stem: _read_template(path) for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    single_file = directory / "chat_template.jinja"
    if single_file.is_file():
        sources["default"] = _read_template(single_file)
    if sources:
        return sources
    place = f"{config.name}: chat_template"
    match config.values.get("chat_template"):
        case None | "":
            return {}
        case str(source):
            return {"default": (place, source)}
        case list(entries):
            named = [
                CheckpointFile(config.name, entry, "chat_template.") for entry in entries if isinstance(entry, dict)
            ]
            if len(named) == len(entries):
                texts = {template.text("name"): template.text("template") for template in named}
                return {name: (f"{place}, {name!r}", text) for name, text in texts.items()}
        case dict(entries):
            templates = CheckpointFile(config.name, entries, "chat_template.")
            return {name: (f"{place}.{name}", templates.text(name)) for name in entries}
    config.refuse("chat_template", 'a string, a list of {"name": ..., "template": ...} or a map of names to templates')


def _read_template(path: Path) -> tuple[str, str]:
    try:
        return path.name, path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} cannot be read as UTF-8: {error}") from None


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What the files beside `tokenizer.json` say of tokens."""

    named: dict[str, list[AddedToken]]
    """They are by `bos_token` and so on. There may be several of `eos_token`: each ends a turn, the first is the
    template's."""
    stored: list[AddedToken]
    """They have ids of their own in the files, by id. One that `tokenizer.json` has with other flags counts all the
    same."""
    extra: list[AddedToken]
    """They are special without a name."""

    @property
    def texts(self) -> dict[str, str]:
        """Returns what a chat template writes by its names."""
        return {name: tokens[0].content for name, tokens in self.named.items()}

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Adds those that the tokenizer lacks, or has with other flags. One with a name is special, whatever its
        own flag says."""
        named = [token for tokens in self.named.values() for token in tokens]
        named_texts = {token.content for token in named}
        latest = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        new: list[AddedToken] = []
        for token in self.stored:
            if repr(token) != repr(latest.get(token.content)):
                latest[token.content] = token
                new.append(token)
        for token in latest.values():
            if token.content in named_texts and not token.special:
                token.special = True
                new.append(token)
        for token in [*named, *self.extra]:
            if token.content not in latest:
                latest[token.content] = token
                token.special = token.special or token.content in named_texts
                new.append(token)
        tokenizer.add_tokens(new)


def read_special_tokens(directory: Path, config: CheckpointFile, tokenizer: Tokenizer) -> SpecialTokens:
    """Reads the tokens; `config` is `tokenizer_config.json`. Where it has no `added_tokens_decoder`, the files of older
    checkpoints count too: `special_tokens_map.json`, before it, and `added_tokens.json`. Raises CheckpointError."""
    decoder = config.section("added_tokens_decoder")
    if decoder is not None:
        return SpecialTokens(_named(config, None), _decoder_tokens(config, decoder), _extra(config, None))
    older = CheckpointFile.read(directory, "special_tokens_map.json")
    named, extra = _named(config, older), _extra(config, older)
    special_texts = {token.content for tokens in [*named.values(), extra] for token in tokens}
    stored = _older_tokens(CheckpointFile.read(directory, "added_tokens.json"), special_texts, tokenizer)
    return SpecialTokens(named, stored, extra)


def _named(config: CheckpointFile, older: CheckpointFile | None) -> dict[str, list[AddedToken]]:
    found: dict[str, list[AddedToken]] = {}
    for name in _STANDARD_NAMES:
        # A null in the file that counts first says that there is none, as transformers reads it.
        file = older if older is not None and name in older.values else config
        if name == "eos_token" and isinstance(file.values.get(name), list):
            found[name] = _listed(file, name)
        elif file.values.get(name) is not None:
            found[name] = [_added_token(file, name)]
    for file in (config,) if older is None else (config, older):
        for name, value in file.values.items():
            is_free = name not in _STANDARD_NAMES and name not in found
            if is_free and name.endswith("_token") and _is_token(value):
                found[name] = [_added_token(file, name)]
    if isinstance(config.values.get(_EXTRA), dict):
        extra = config.section(_EXTRA)
        found |= {name: [_added_token(extra, name)] for name in extra.values} if extra is not None else {}
    return {name: tokens for name, tokens in found.items() if tokens}


def _extra(config: CheckpointFile, older: CheckpointFile | None) -> list[AddedToken]:
    """Returns those under the newer of two names, if both are there."""
    if isinstance(config.values.get(_EXTRA), dict):
        return []
    tokens = _listed(config, _EXTRA) or _listed(config, _OLD_EXTRA)
    if older is None:
        return tokens
    older_tokens = _listed(older, _EXTRA)
    older_tokens = older_tokens if tokens or older_tokens else _listed(older, _OLD_EXTRA)
    for token in older_tokens:
        token.special = True
    return tokens + older_tokens


def _decoder_tokens(config: CheckpointFile, decoder: CheckpointFile) -> list[AddedToken]:
    for token_id in decoder.values:
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 11):
            config.refuse("added_tokens_decoder", "a map of token ids, written as strings, to tokens")
    return [_added_token(decoder, token_id) for token_id in sorted(decoder.values, key=int)]


def _older_tokens(file: CheckpointFile, special_texts: set[str], tokenizer: Tokenizer) -> list[AddedToken]:
    """Reads `added_tokens.json`, a map of tokens to ids; what `tokenizer.json` adds under the same id counts
    instead."""
    for text, token_id in file.values.items():
        if type(token_id) is not int or not 0 <= token_id < 1 << 31:
            file.refuse(text, "a token id: a whole number from 0 to 2147483647")
    taken = tokenizer.get_added_tokens_decoder()
    texts = [text for text, token_id in sorted(file.values.items(), key=lambda item: item[1]) if token_id not in taken]
    return [AddedToken(text, normalized=text not in special_texts, special=text in special_texts) for text in texts]


def _listed(file: CheckpointFile, key: str) -> list[AddedToken]:
    return [_added_token(item, at) for item in file.items(key) for at in item.values]


def _is_token(value: Any) -> bool:
    """Tells a token from the value of a key that only ends as names of tokens do, such as `add_bos_token`."""
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _added_token(file: CheckpointFile, key: str) -> AddedToken:
    """Reads one token. A string stands for a special one, as in transformers."""
    value = file.values[key]
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        file.refuse(key, "a string or an object with a string `content`")
    token = CheckpointFile(file.name, value, f"{file.path}{key}.")
    flags = [flag for flag in _FLAGS if value.get(flag) is not None]
    return AddedToken(value["content"], **{flag: token.flag(flag) for flag in flags})
