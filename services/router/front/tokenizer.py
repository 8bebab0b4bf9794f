"""Text to token ids and back, from a Hugging Face directory: as transformers' AutoTokenizer does it, without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from common.errors import CheckpointError, InvalidRequestError
from services.router.front.chat_template import ChatTemplate
from services.router.front.checkpoint_defaults import CheckpointDefaults, read_checkpoint_defaults
from services.router.front.checkpoint_file import CheckpointFile
from services.router.front.detokenizer import Detokenizer, create_detokenizer
from services.router.front.library_panics import panics_are_errors
from services.router.front.message_content import Message
from services.router.front.token_bound import TokenBound
from services.router.front.vocabulary import Vocabulary

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TextTokenizer:
    """Thread-safe: encoding may run in any thread."""

    def __init__(
        self, tokenizer: Tokenizer, chat_templates: Mapping[str, ChatTemplate], defaults: CheckpointDefaults
    ) -> None:
        """`chat_templates` by name; the one named "default" is used. The tokenizer must not be changed any more."""
        self._tokenizer = tokenizer
        self._chat_templates = dict(chat_templates)
        self.defaults = defaults
        self.vocabulary = Vocabulary(tokenizer)
        self._bound = TokenBound(tokenizer)

    @classmethod
    def from_directory(cls, directory: Path) -> TextTokenizer:
        """Reads the tokenizer's files. Raises CheckpointError, which names the file."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        config = CheckpointFile.read(directory, "tokenizer_config.json")
        named = _named_special_tokens(directory, config)
        _complete(tokenizer, config, [token for tokens in named.values() for token in tokens])
        special_tokens = {name: tokens[0].content for name, tokens in named.items()}
        templates = {
            name: ChatTemplate(source, special_tokens) for name, source in _template_sources(directory, config).items()
        }
        ends = (tokenizer.token_to_id(token.content) for token in named.get("eos_token", []))
        return cls(
            tokenizer,
            templates,
            read_checkpoint_defaults(directory, [token_id for token_id in ends if token_id is not None]),
        )

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._chat_templates

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt; releases the interpreter's lock while it works."""
        # `encode` would keep the lock, and with it the event loop, for the whole of a long prompt.
        with panics_are_errors:
            encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encodings[0].ids
        return ids

    def least_tokens(self, text: str) -> int:
        """`encode` gives no fewer; cheap."""
        return self._bound.least_tokens(text)

    def render_chat(
        self, messages: Sequence[Message], template_arguments: Mapping[str, Any], now: datetime | None = None
    ) -> str:
        """The text of a chat, up to where the assistant's turn begins; `now` is the date that a template sees. The
        template writes special tokens itself: encode it without.

        Raises InvalidRequestError if there is no chat template or it refuses the messages.
        """
        template = self._chat_templates.get("default")
        if template is None:
            names = ", ".join(sorted(self._chat_templates))
            reason = f"has no default one among its chat templates ({names})" if names else "has no chat template"
            raise InvalidRequestError(f"this model {reason}; use /v1/completions", "messages")
        return template.render(messages, template_arguments, now)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """All ids at once."""
        with panics_are_errors:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def create_detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """For one choice, whose text follows the prompt's."""
        return create_detokenizer(self.vocabulary, prompt_token_ids)

    def echo(self, prompt_token_ids: Sequence[int]) -> str:
        """A prompt as text to which the text of a choice can be added: without a last character that has only begun."""
        text = self.decode(prompt_token_ids, skip_special_tokens=False)
        return text.removesuffix(self.create_detokenizer(prompt_token_ids).flush())


def _complete(tokenizer: Tokenizer, config: CheckpointFile, named: Sequence[AddedToken]) -> None:
    """Adds what transformers adds to the tokenizer of tokenizer.json.

    `add_bos_token` and `add_eos_token` of tokenizer_config.json are not looked at: transformers drops them where there
    is a tokenizer.json, whose post-processor says it better.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = config.flag("split_special_tokens")
    if tokenizer.post_processor is None:
        tokenizer.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    special_texts = {token.content for token in named}
    for token in [*_decoder_tokens(config), *named, *_extra_tokens(config)]:
        if token.content in known:
            continue
        known.add(token.content)
        token.special = token.special or token.content in special_texts
        tokenizer.add_tokens([token])


def _decoder_tokens(config: CheckpointFile) -> list[AddedToken]:
    """Of `added_tokens_decoder`, by id."""
    decoder = config.section("added_tokens_decoder")
    if decoder is None:
        return []
    for token_id in decoder.values:
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 11):
            config.refuse("added_tokens_decoder", "a map of token ids, written as strings, to tokens")
    return [_added_token(decoder, token_id) for token_id in sorted(decoder.values, key=int)]


def _extra_tokens(config: CheckpointFile) -> list[AddedToken]:
    """Under the newer of two names, if both are there; a list, or a map of names to tokens."""
    keys = ("extra_special_tokens", "additional_special_tokens")
    key = next((key for key in keys if config.values.get(key)), keys[0])
    if isinstance(config.values.get(key), dict):
        extra = config.section(key)
        return [] if extra is None else [_added_token(extra, name) for name in extra.values]
    return [_added_token(item, at) for item in config.items(key) for at in item.values]


def _added_token(file: CheckpointFile, key: str) -> AddedToken:
    """A string stands for a special token, as in transformers."""
    value = file.values[key]
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        file.refuse(key, "a string or an object with a string `content`")
    token = CheckpointFile(file.name, value, f"{file.path}{key}.")
    flags = [flag for flag in _TOKEN_FLAGS if value.get(flag) is not None]
    return AddedToken(value["content"], **{flag: token.flag(flag) for flag in flags})


def _named_special_tokens(directory: Path, config: CheckpointFile) -> dict[str, list[AddedToken]]:
    """`bos_token` and so on; older checkpoints have them in a file of their own, which then counts.

    There may be several of `eos_token`: each ends a turn, and the first one is the chat template's.
    """
    files = [config]
    if "added_tokens_decoder" not in config.values:
        files.insert(0, CheckpointFile.read(directory, "special_tokens_map.json"))
    found: dict[str, list[AddedToken]] = {}
    for name in _SPECIAL_TOKEN_NAMES:
        # A null in the file that counts first says that there is none, as transformers reads it.
        file = next((file for file in files if name in file.values), config)
        if name == "eos_token" and isinstance(file.values.get(name), list):
            tokens = [_added_token(item, at) for item in file.items(name) for at in item.values]
        else:
            tokens = [] if file.values.get(name) is None else [_added_token(file, name)]
        if tokens:
            found[name] = tokens
    return found


def _template_sources(directory: Path, config: CheckpointFile) -> dict[str, str]:
    """Templates by name. Files count before entries of tokenizer_config.json."""
    sources = {path.stem: _read_template(path) for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    single_file = directory / "chat_template.jinja"
    if single_file.is_file():
        sources["default"] = _read_template(single_file)
    if sources:
        return sources
    match config.values.get("chat_template"):
        case None | "":
            return {}
        case str(source):
            return {"default": source}
        case list(entries):
            named = [
                CheckpointFile(config.name, entry, "chat_template.") for entry in entries if isinstance(entry, dict)
            ]
            if len(named) == len(entries):
                return {template.text("name"): template.text("template") for template in named}
        case dict(entries):
            templates = CheckpointFile(config.name, entries, "chat_template.")
            return {name: templates.text(name) for name in entries}
    config.refuse("chat_template", 'a string, a list of {"name": ..., "template": ...} or a map of names to templates')


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} cannot be read as UTF-8: {error}") from None
