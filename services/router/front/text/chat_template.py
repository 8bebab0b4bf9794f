"""Renders a checkpoint's chat template as transformers does: same Jinja settings, same helpers, same sandbox.

Templates come with the checkpoint and are not trusted: they run in Jinja's immutable sandbox, and see plain JSON values
only. Where a template does not take what a client sent (a list of parts, the role `developer`), it gets the same in a
form that it takes. What follows `apply_chat_template` of transformers (utils/chat_template_utils.py).
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
from services.router.front.text.message_content import (
    SILENT_FORMS,
    Message,
    PreparedMessages,
    SilentForm,
    note_written_out,
)

_PROBE = "moemesh-content-probe"
_PROBED: dict[str, tuple[Message, ...]] = {
    "system": ({"role": "system", "content": _PROBE}, {"role": "user", "content": "a"}),
    "developer": ({"role": "developer", "content": _PROBE}, {"role": "user", "content": "a"}),
    "user": ({"role": "user", "content": _PROBE},),
    "assistant": (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": _PROBE},
        {"role": "user", "content": "b"},
    ),
    "tool": (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": _PROBE, "tool_call_id": "call00001", "name": "f"},
    ),
}
"""A conversation for each role, in which the probe is what that role says."""


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
    note_written_out(value)
    # Jinja's own filter escapes HTML characters, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _is_silent(message: Message) -> bool:
    return "content" not in message or bool(message.get("tool_calls"))


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
        # A template that names the role knows it; one that writes any role out would teach its model a new word.
        self._knows_developer = "developer" in source
        self._part_roles = frozenset(role for role in _PROBED if self._takes_parts_alone(role))
        self._list_roles = frozenset(role for role in _PROBED if self._takes_lists(role))

    def render(
        self, messages: Sequence[Message], template_arguments: Mapping[str, Any], now: datetime | None = None
    ) -> str:
        """The prompt's text, up to where the assistant's turn begins. Raises InvalidRequestError with what the template
        says against the messages. With `now`, a request that is rendered again later has the same text."""
        known = [self._known(message) for message in messages]
        arguments = {**({} if now is None else {"strftime_now": now.strftime}), **template_arguments}
        best: tuple[int, str] | None = None
        errors: list[Exception] = []
        for form in SILENT_FORMS if any(map(_is_silent, known)) else SILENT_FORMS[:1]:
            try:
                text, num_hidden_calls = self._render_form(known, arguments, form)
            # A template is a program: what it raises on odd messages may be any error, and is the request's fault.
            except Exception as error:
                errors.append(error)
                continue
            if best is None or num_hidden_calls < best[0]:
                best = (num_hidden_calls, text)
            if num_hidden_calls == 0:
                break
        if best is None:
            # What the template itself says against them tells more than what it stumbled over.
            told = next((error for error in errors if type(error) is jinja2.TemplateError), errors[0])
            raise InvalidRequestError(f"the chat template refuses these messages: {told}", "messages") from told
        return best[1]

    def _render_form(self, known: Sequence[Message], arguments: Mapping[str, Any], form: SilentForm) -> tuple[str, int]:
        """The text, and how many calls of tools it does not show. Raises what the template raises."""
        text_roles: frozenset[str] = frozenset()
        while True:
            prepared = PreparedMessages(known, text_roles, self._part_roles, form)
            try:
                text = self._render(prepared.messages, arguments)
                refusing = prepared.refusing_roles()
            except Exception:
                # Perhaps at a list: of a role that takes none by itself, or else of any.
                lists = prepared.watched_roles()
                refusing = [role for role in lists if role not in self._list_roles] or lists[:1]
                if not refusing:
                    raise
            if not refusing:
                return text, prepared.num_hidden_calls()
            text_roles = text_roles.union(refusing)

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

    def _known(self, message: Message) -> Message:
        """Without null fields, and in names that the template knows."""
        known = {name: value for name, value in message.items() if value is not None}
        reasoning = known.get("reasoning_content")
        if reasoning is not None:
            known.setdefault("thinking", reasoning)  # gpt-oss templates read it under this name
        if known.get("role") == "developer" and not self._knows_developer:
            known["role"] = "system"  # what OpenAI called it before
        return known

    def _takes_parts_alone(self, role: str) -> bool:
        """True if what the role says is lost as a string and comes out as a list of parts."""
        as_text = PreparedMessages(_PROBED[role], frozenset(), frozenset())
        as_parts = PreparedMessages(_PROBED[role], frozenset(), frozenset({role}))
        return not self._shows_probe(as_text) and self._shows_probe(as_parts)

    def _takes_lists(self, role: str) -> bool:
        """True if a list of parts comes out as the text of them all, wherever else a list may not be taken."""
        parts = [{"type": "text", "text": _PROBE}, {"type": "text", "text": "c"}]
        messages = [{**message, "content": parts} if message["role"] == role else message for message in _PROBED[role]]
        prepared = PreparedMessages(messages, frozenset(), self._part_roles)
        return self._shows_probe(prepared) and not prepared.refusing_roles()

    def _shows_probe(self, prepared: PreparedMessages) -> bool:
        try:
            return _PROBE in self._render(prepared.messages, {})
        except Exception:  # any error says the same: not in this form
            return False
