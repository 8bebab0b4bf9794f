"""Text to token ids and back, from a Hugging Face directory: as transformers' AutoTokenizer does it, without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from common.errors import CheckpointError, InvalidRequestError
from services.router.front.chat_template import ChatTemplate, Message
from services.router.front.checkpoint_defaults import CheckpointDefaults, read_checkpoint_defaults, read_json_object
from services.router.front.detokenizer import Detokenizer, create_detokenizer
from services.router.front.token_bound import TokenBound
from services.router.front.vocabulary import Vocabulary

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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
        config = read_json_object(directory / "tokenizer_config.json")
        named = _named_special_tokens(directory, config)
        _complete(tokenizer, config, named)
        special_tokens = {name: token.content for name, token in named.items()}
        templates = {
            name: ChatTemplate(source, special_tokens) for name, source in _template_sources(directory, config).items()
        }
        return cls(tokenizer, templates, read_checkpoint_defaults(directory))

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._chat_templates

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt; releases the interpreter's lock while it works."""
        # `encode` would keep the lock, and with it the event loop, for the whole of a long prompt.
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
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def create_detokenizer(self) -> Detokenizer:
        """For one choice."""
        return create_detokenizer(self.vocabulary)


def _complete(tokenizer: Tokenizer, config: Mapping[str, Any], named: Mapping[str, AddedToken]) -> None:
    """Adds what transformers adds to the tokenizer of tokenizer.json.

    `add_bos_token` and `add_eos_token` of tokenizer_config.json are not looked at: transformers drops them where there
    is a tokenizer.json, whose post-processor says it better.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    if tokenizer.post_processor is None:
        tokenizer.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder", {})
    missing = [_added_token(decoder[token_id]) for token_id in sorted(decoder, key=int)]
    missing += named.values()
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    missing += [_added_token(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    special_texts = {token.content for token in named.values()}
    for token in missing:
        if token.content in known:
            continue
        known.add(token.content)
        token.special = token.special or token.content in special_texts
        tokenizer.add_tokens([token])


def _added_token(value: str | Mapping[str, Any]) -> AddedToken:
    """A string stands for a special token, as in transformers."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{flag: bool(value[flag]) for flag in flags if flag in value})


def _named_special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """`bos_token` and so on; older checkpoints have them in a file of their own, which then counts."""
    values = dict(config)
    if "added_tokens_decoder" not in config:
        values.update(read_json_object(directory / "special_tokens_map.json"))
    return {name: _added_token(values[name]) for name in _SPECIAL_TOKEN_NAMES if values.get(name) is not None}


def _template_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files count before entries of tokenizer_config.json."""
    sources = {path.stem: path.read_text("utf-8") for path in directory.glob("additional_chat_templates/*.jinja")}
    single_file = directory / "chat_template.jinja"
    if single_file.is_file():
        sources["default"] = single_file.read_text("utf-8")
    if sources:
        return sources
    entry = config.get("chat_template")
    match entry:
        case None:
            return {}
        case str():
            return {"default": entry}
        case list():
            return {str(template["name"]): str(template["template"]) for template in entry}
        case dict():
            return {str(name): str(source) for name, source in entry.items()}
    raise CheckpointError("tokenizer_config.json: chat_template must be a string or a list of named templates")
