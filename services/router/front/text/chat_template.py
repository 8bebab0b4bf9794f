"""Renders a checkpoint's chat template as transformers does: same Jinja settings, same helpers, same sandbox.

Templates come with the checkpoint and are not trusted: they run in Jinja's immutable sandbox, and see plain JSON values
only. Where a template does not take what a client sent (a list of parts, the role `developer`), it gets the same in a
form that it takes. What follows `apply_chat_template` of transformers (utils/chat_template_utils.py).

Templates differ by role, and by where a message stands. So a list is given as it came, and it is watched what the
template does with it: one that writes the list itself out (as Python or JSON), or leaves the text of a part unread,
does not take it, and gets the text as a string. Calls are watched too: some templates show them only where the content
is null, or want their arguments as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
TextPart = Mapping[str, Any]
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
    _note_written_out(value)
    # Jinja's own filter escapes HTML characters, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _is_silent(message: Message) -> bool:
    return "content" not in message or bool(message.get("tool_calls"))


class ChatTemplate:
    """A compiled template with the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are `bos_token`, `eos_token`, ... Raises CheckpointError if the template does not
        compile."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        # Not the class: templates cannot reach attributes of a type.
        environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        environment.globals["namespace"] = _TemplateNamespace
        try:
            self._template = environment.from_string(source)
        # Constants are computed at once, so a template may raise anything here.
        except Exception as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)
        # A template that names the role knows it; one that writes any role out would teach its model a new word.
        self._knows_developer = "developer" in source
        self._part_roles = frozenset(role for role in _PROBED if self._accepts_parts_alone(role))
        self._list_roles = frozenset(role for role in _PROBED if self._accepts_lists(role))

    def render(
        self, messages: Sequence[Message], template_arguments: Mapping[str, Any], now: datetime | None = None
    ) -> str:
        """Returns the prompt's text, up to where the assistant's turn begins. With `now`, a request that is rendered
        again later has the same text. Raises InvalidRequestError with what the template says against the messages."""
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
        """Returns the text, and how many calls of tools it does not show. Raises what the template raises."""
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
        """Returns the message without null fields, and in names that the template knows."""
        known = {name: value for name, value in message.items() if value is not None}
        reasoning = known.get("reasoning_content")
        if reasoning is not None:
            known.setdefault("thinking", reasoning)  # gpt-oss templates read it under this name
        if known.get("role") == "developer" and not self._knows_developer:
            known["role"] = "system"  # what OpenAI called it before
        return known

    def _accepts_parts_alone(self, role: str) -> bool:
        """Says whether what the role says is lost as a string and comes out as a list of parts."""
        as_text = PreparedMessages(_PROBED[role], frozenset(), frozenset())
        as_parts = PreparedMessages(_PROBED[role], frozenset(), frozenset({role}))
        return not self._shows_probe(as_text) and self._shows_probe(as_parts)

    def _accepts_lists(self, role: str) -> bool:
        """Says whether a list of parts comes out as the text of them all, wherever else a list may not be accepted."""
        parts = [{"type": "text", "text": _PROBE}, {"type": "text", "text": "c"}]
        messages = [{**message, "content": parts} if message["role"] == role else message for message in _PROBED[role]]
        prepared = PreparedMessages(messages, frozenset(), self._part_roles)
        return self._shows_probe(prepared) and not prepared.refusing_roles()

    def _shows_probe(self, prepared: PreparedMessages) -> bool:
        try:
            return _PROBE in self._render(prepared.messages, {})
        except Exception:  # any error says the same: not in this form
            return False


@dataclass(frozen=True, slots=True)
class SilentForm:
    """Says how an assistant that says nothing, and perhaps calls tools, is shown to a template."""

    content: Mapping[str, str | None]
    """It stands in place of what the assistant does not say."""
    are_arguments_text: bool = False
    """Arguments of calls are JSON text; else they are objects, as transformers documents it."""


SILENT_FORMS = tuple(
    SilentForm(content, are_arguments_text)
    for are_arguments_text in (False, True)
    # Without content as transformers hands such a message over; some templates join it to other text, or ask for null.
    for content in ({}, {"content": ""}, {"content": None})
)
"""They are tried in this order."""


# Templates reach no name that begins with an underscore, so what is noted is out of their sight.
class _Watched(dict[str, Any]):
    """Notes which values of an object in a message a template reads, and whether it writes out the whole object."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._read: set[str] = set()
        self._is_written_out = False

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def __repr__(self) -> str:
        self._is_written_out = True
        return super().__repr__()

    __str__ = __repr__


class _WatchedFunction(_Watched):
    """Notes whether a template shows a call: then it reads the function's name, or writes all of it out."""

    def items(self) -> Any:
        self._is_written_out = True
        return super().items()

    @property
    def _is_shown(self) -> bool:
        return self._is_written_out or "name" in self._read


class _WatchedParts(list[_Watched]):
    """Notes what a template does with the text parts of a message."""

    def __init__(self, parts: Iterable[TextPart]) -> None:
        super().__init__(map(_Watched, parts))
        self._is_written_out = False

    def __repr__(self) -> str:
        self._is_written_out = True
        return super().__repr__()

    __str__ = __repr__

    @property
    def _are_accepted(self) -> bool:
        """Says whether they were read as parts, every one of them."""
        is_written_out = self._is_written_out or any(part._is_written_out for part in self)
        return not is_written_out and all("text" in part._read for part in self)


def _note_written_out(value: object) -> None:
    """Notes that `value` is about to be written as JSON, with all that is in it."""
    if isinstance(value, (_Watched, _WatchedParts)):
        value._is_written_out = True
    elif isinstance(value, Mapping):
        for inner in value.values():
            _note_written_out(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _note_written_out(inner)


class PreparedMessages:
    """Holds the messages for one rendering, and what the template did with their parts."""

    def __init__(
        self,
        messages: Sequence[Message],
        text_roles: frozenset[str],
        part_roles: frozenset[str],
        silent_form: SilentForm = SILENT_FORMS[0],
    ) -> None:
        """Parts of `text_roles` become one text; `part_roles` accept no strings, but parts alone."""
        self._lists: list[tuple[str, _WatchedParts]] = []
        """(role, parts) of each message that was given as a list."""
        self._functions: list[_WatchedFunction] = []
        formed = [self._in_form(message, silent_form) for message in messages]
        self.messages = [self._prepare(message, text_roles, part_roles) for message in formed]

    def watched_roles(self) -> list[str]:
        """Returns the roles of messages that were given as a list, in order."""
        return list(dict.fromkeys(role for role, _ in self._lists))

    def refusing_roles(self) -> list[str]:
        """Returns those of them whose lists the template did not accept."""
        return list(dict.fromkeys(role for role, parts in self._lists if not parts._are_accepted))

    def num_hidden_calls(self) -> int:
        """Counts the calls of tools that the template did not show."""
        return sum(not function._is_shown for function in self._functions)

    def _in_form(self, message: Message, form: SilentForm) -> Message:
        calls = message.get("tool_calls")
        # An empty string beside calls says no more than null does, and clients send either.
        is_silent = "content" not in message or (bool(calls) and not message["content"])
        formed = {**message, **form.content} if is_silent else message
        if not calls:
            return formed
        functions = [_WatchedFunction(_function(call["function"], form.are_arguments_text)) for call in calls]
        self._functions += functions
        watched = [{**call, "function": function} for call, function in zip(calls, functions, strict=True)]
        return {**formed, "tool_calls": watched}

    def _prepare(self, message: Message, text_roles: frozenset[str], part_roles: frozenset[str]) -> Message:
        role, content = str(message.get("role")), message.get("content")
        if isinstance(content, str):
            return {**message, "content": [_part(content)]} if role in part_roles else message
        if not isinstance(content, list):
            return message
        parts = [_part(part) if isinstance(part, str) else _without_nulls(part) for part in content]
        if role in text_roles:
            text = "\n".join(part["text"] for part in parts)  # a line each, as vLLM and llama.cpp do
            return {**message, "content": [_part(text)] if role in part_roles else text}
        watched = _WatchedParts(parts)
        self._lists.append((role, watched))
        return {**message, "content": watched}


def _function(function: Mapping[str, Any], are_arguments_text: bool) -> Mapping[str, Any]:
    arguments = function.get("arguments")
    if not are_arguments_text or isinstance(arguments, str):
        return function
    return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}


def _part(text: str) -> TextPart:
    return {"type": "text", "text": text}


def _without_nulls(part: TextPart) -> TextPart:
    return {name: value for name, value in part.items() if value is not None}
