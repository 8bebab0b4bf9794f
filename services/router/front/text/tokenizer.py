"""Text to token ids and back, from a Hugging Face directory: as transformers' AutoTokenizer does it, without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from common.errors import CheckpointError, InvalidRequestError
from services.router.front.text.chat_template import ChatTemplate
from services.router.front.text.checkpoint_defaults import CheckpointDefaults, read_checkpoint_defaults
from services.router.front.text.checkpoint_file import CheckpointFile
from services.router.front.text.detokenizer import Detokenizer, begun_character, create_detokenizer
from services.router.front.text.library_panics import panics_are_errors
from services.router.front.text.message_content import Message
from services.router.front.text.special_tokens import SpecialTokens, read_special_tokens
from services.router.front.text.token_bound import TokenBound
from services.router.front.text.vocabulary import Vocabulary

_SHOWN_CHARACTERS = 300
"""Of what the library says against a file, which may hold a good part of it."""


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
        with _errors_of_the_library("read"):
            tokenizer = Tokenizer.from_file(str(path))
        config = CheckpointFile.read(directory, "tokenizer_config.json")
        tokens = read_special_tokens(directory, config, tokenizer)
        _complete(tokenizer, config, tokens)
        sources = _template_sources(directory, config)
        templates = {name: _compiled(source, tokens) for name, source in sources.items()}
        ends = (tokenizer.token_to_id(token.content) for token in tokens.named.get("eos_token", []))
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
        begun = begun_character(self.vocabulary, prompt_token_ids)
        if begun and list(prompt_token_ids[-len(begun) :]) == begun:
            # The library would take whole characters before these for faults as well.
            return self.decode(prompt_token_ids[: -len(begun)], skip_special_tokens=False)
        text = self.decode(prompt_token_ids, skip_special_tokens=False)
        return text.removesuffix(self.create_detokenizer(prompt_token_ids).flush())


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
    """As CheckpointError. The library raises Exception itself, and panics at some of what it has read before."""
    try:
        with panics_are_errors:
            yield
    except Exception as error:
        raise CheckpointError(f"tokenizer.json cannot be {done}: {str(error)[:_SHOWN_CHARACTERS]}") from error


@dataclass(frozen=True, slots=True)
class _TemplateSource:
    place: str
    """File, or file and key."""
    text: str


def _compiled(source: _TemplateSource, tokens: SpecialTokens) -> ChatTemplate:
    try:
        return ChatTemplate(source.text, tokens.texts)
    except CheckpointError as error:
        raise CheckpointError(f"{source.place}: {error.message}") from error


def _template_sources(directory: Path, config: CheckpointFile) -> dict[str, _TemplateSource]:
    """Templates by name. Files count before entries of tokenizer_config.json."""
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
            return {"default": _TemplateSource(place, source)}
        case list(entries):
            named = [
                CheckpointFile(config.name, entry, "chat_template.") for entry in entries if isinstance(entry, dict)
            ]
            if len(named) == len(entries):
                texts = {template.text("name"): template.text("template") for template in named}
                return {name: _TemplateSource(f"{place}, {name!r}", text) for name, text in texts.items()}
        case dict(entries):
            templates = CheckpointFile(config.name, entries, "chat_template.")
            return {name: _TemplateSource(f"{place}.{name}", templates.text(name)) for name in entries}
    config.refuse("chat_template", 'a string, a list of {"name": ..., "template": ...} or a map of names to templates')


def _read_template(path: Path) -> _TemplateSource:
    try:
        return _TemplateSource(path.name, path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} cannot be read as UTF-8: {error}") from None
