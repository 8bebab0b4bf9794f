"""Renders a checkpoint's chat template as transformers does: same Jinja settings, same helpers, same sandbox.

Templates come with the checkpoint and are not trusted: they run in Jinja's immutable sandbox, and see plain JSON values
only. What follows `apply_chat_template` of transformers (utils/chat_template_utils.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from common.errors import CheckpointError, InvalidRequestError

Message = Mapping[str, Any]
_PROBE = "moemesh-content-probe"


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training; here its body is rendered and nothing else."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateDict:
    """`dict` without the class: templates cannot reach attributes of a type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _TemplateNamespace(Namespace):
    """Refuses underscore names, which could reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's: so `namespace(self=...)` works
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store the attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template with the special tokens that it may write."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now
    ) -> None:
        """`special_tokens`: `bos_token`, `eos_token`, ...; raises CheckpointError if the template does not compile."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        environment.globals["dict"] = _TemplateDict()
        environment.globals["namespace"] = _TemplateNamespace
        try:
            self._template = environment.from_string(source)
        # Constants are computed at once, so a template may raise anything here.
        except Exception as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._takes_parts = self._probe_parts()

    def render(
        self, messages: Sequence[Message], template_arguments: Mapping[str, Any], now: datetime | None = None
    ) -> str:
        """The prompt's text, up to where the assistant's turn begins. Raises InvalidRequestError with what the template
        says against the messages. With `now`, a request that is rendered again later has the same text."""
        flattened = [self._flatten(message) for message in messages]
        clock = {} if now is None else {"strftime_now": now.strftime}
        try:
            return self._render(flattened, {**clock, **template_arguments})
        # A template is a program: what it raises on odd messages may be any error, and is the request's fault.
        except Exception as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", "messages") from error

    def _render(self, messages: Sequence[Message], template_arguments: Mapping[str, Any]) -> str:
        values: dict[str, Any] = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **template_arguments,
            "messages": messages,
        }
        return self._template.render(values)

    def _flatten(self, message: Message) -> Message:
        """Text parts become one string, a line each, where the template knows strings only; null fields go."""
        flattened = {name: value for name, value in message.items() if value is not None}
        reasoning = flattened.get("reasoning_content")
        if reasoning is not None:
            flattened.setdefault("thinking", reasoning)  # gpt-oss templates read it under this name
        content = flattened.get("content")
        if isinstance(content, list) and not self._takes_parts:
            flattened["content"] = "\n".join(part["text"] for part in content)
        return flattened

    def _probe_parts(self) -> bool:
        """True if the template itself takes a list of parts: then the text comes out, and not the list's own form."""
        parts = [{"type": "text", "text": _PROBE}]
        try:
            rendered = self._render([{"role": "user", "content": parts}], {})
        except Exception:  # any error says the same: no list
            return False
        return _PROBE in rendered and f"'{_PROBE}'" not in rendered and f'"{_PROBE}"' not in rendered
