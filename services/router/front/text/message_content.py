"""Chat messages in the form that a template takes: content as a string or as a list of text parts, and calls of tools.

Templates differ by role, and by where a message stands. So a list is given as it came, and it is watched what the
template does with it: one that writes the list itself out (as Python or JSON), or leaves the text of a part unread,
does not take it, and gets the text as a string. Calls are watched too: some templates show them only where the content
is null, or want their arguments as text. No clock, no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
TextPart = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SilentForm:
    """How an assistant that says nothing, and perhaps calls tools, is told to a template."""

    content: Mapping[str, str | None]
    """In place of what it does not say."""
    are_arguments_text: bool = False
    """Arguments of calls as JSON text; else as objects, as transformers documents it."""


SILENT_FORMS = tuple(
    SilentForm(content, are_arguments_text)
    for are_arguments_text in (False, True)
    # Without content as transformers hands such a message over; some templates join it to other text, or ask for null.
    for content in ({}, {"content": ""}, {"content": None})
)
"""In the order in which they are tried."""


class Watch:
    """What a template does with the parts of one message."""

    __slots__ = ("is_written_out", "unread")

    def __init__(self, num_parts: int) -> None:
        self.is_written_out = False
        self.unread = set(range(num_parts))

    @property
    def is_taken(self) -> bool:
        """True if the parts were read as parts, every one of them."""
        return not self.is_written_out and not self.unread


# Templates reach no name that begins with an underscore, so what is noted is out of their sight.
class _WatchedPart(dict[str, Any]):
    """A text part whose readers are noted."""

    def __init__(self, part: TextPart, watch: Watch, number: int) -> None:
        super().__init__(part)
        self._watch = watch
        self._number = number

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def __repr__(self) -> str:
        self._watch.is_written_out = True
        return super().__repr__()

    __str__ = __repr__

    def _note(self, key: str) -> None:
        if key == "text":
            self._watch.unread.discard(self._number)


class _WatchedParts(list[_WatchedPart]):
    """A list of parts; who writes it out is noted."""

    def __init__(self, parts: Sequence[TextPart], watch: Watch) -> None:
        super().__init__(_WatchedPart(part, watch, number) for number, part in enumerate(parts))
        self._watch = watch

    def __repr__(self) -> str:
        self._watch.is_written_out = True
        return super().__repr__()

    __str__ = __repr__


class _WatchedFunction(dict[str, Any]):
    """What a call names; a template that shows the call reads it, or writes all of it out."""

    def __init__(self, function: Mapping[str, Any]) -> None:
        super().__init__(function)
        self._is_shown = False

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def items(self) -> Any:
        self._is_shown = True
        return super().items()

    def __repr__(self) -> str:
        self._is_shown = True
        return super().__repr__()

    __str__ = __repr__

    def _note(self, key: str) -> None:
        if key == "name":
            self._is_shown = True


def note_written_out(value: object) -> None:
    """`value` is about to be written as JSON, with all that is in it."""
    if isinstance(value, (_WatchedPart, _WatchedParts)):
        value._watch.is_written_out = True
    elif isinstance(value, _WatchedFunction):
        value._is_shown = True
    elif isinstance(value, Mapping):
        for inner in value.values():
            note_written_out(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            note_written_out(inner)


class PreparedMessages:
    """Messages for one rendering, and what the template did with their parts."""

    def __init__(
        self,
        messages: Sequence[Message],
        text_roles: frozenset[str],
        part_roles: frozenset[str],
        silent_form: SilentForm = SILENT_FORMS[0],
    ) -> None:
        """`text_roles`: whose parts become one text; `part_roles`: those that take no strings, but parts alone."""
        self._watches: list[tuple[str, Watch]] = []
        self._functions: list[_WatchedFunction] = []
        formed = [self._in_form(message, silent_form) for message in messages]
        self.messages = [self._prepare(message, text_roles, part_roles) for message in formed]

    def watched_roles(self) -> list[str]:
        """Of messages that were given as a list, in order."""
        return list(dict.fromkeys(role for role, _ in self._watches))

    def refusing_roles(self) -> list[str]:
        """Those of them whose lists the template did not take."""
        return list(dict.fromkeys(role for role, watch in self._watches if not watch.is_taken))

    def num_hidden_calls(self) -> int:
        """Calls of tools that the template did not show."""
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
            text = join_parts(parts)
            return {**message, "content": [_part(text)] if role in part_roles else text}
        watch = Watch(len(parts))
        self._watches.append((role, watch))
        return {**message, "content": _WatchedParts(parts, watch)}


def join_parts(parts: Iterable[TextPart]) -> str:
    """A line each, as vLLM and llama.cpp have it."""
    return "\n".join(part["text"] for part in parts)


def _function(function: Mapping[str, Any], are_arguments_text: bool) -> Mapping[str, Any]:
    arguments = function.get("arguments")
    if not are_arguments_text or isinstance(arguments, str):
        return function
    return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}


def _part(text: str) -> TextPart:
    return {"type": "text", "text": text}


def _without_nulls(part: TextPart) -> TextPart:
    return {name: value for name, value in part.items() if value is not None}
