"""Messages of a chat, as clients send them and as chat templates know them. Pure."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from services.router.front.schema.schema_rules import Name, Strict, described
from services.router.front.schema.unused_fields import Json

MAX_MESSAGES = 4096
"""And parts of one message."""
MAX_TOOL_CALLS = 128
"""Of one message."""


class TextPart(Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)],
    described(f'a string or a list of up to {MAX_MESSAGES} {{"type": "text", "text": ...}} parts'),
]


class CalledFunction(Strict):
    """What the assistant called, with its arguments as JSON: text, as replies carry them, or the object itself."""

    name: Name
    arguments: str | dict[str, Any] = ""


class ToolCall(Strict):
    """One call of a former turn."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


ToolCalls = Annotated[
    Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None,
    described(
        f'a list of up to {MAX_TOOL_CALLS} calls as in {{"id": "call_1", "type": "function", "function": {{"name": '
        '"f", "arguments": "{}"}}'
    ),
]
Role = Annotated[
    # `developer` is what OpenAI calls `system` since; most chat templates do not know it.
    Literal["system", "developer", "user", "assistant", "tool"],
    described("system, developer, user, assistant or tool"),
]


class ChatMessage(Strict):
    """One turn. An assistant's may have tool calls, and then no content; a tool's is what a call came to."""

    role: Role
    content: Content | None = None
    name: Name | None = None
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    tool_calls: ToolCalls = None

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("no_content", "`content`: is required: a string or a list of parts")
        if self.content is None and not self.tool_calls and "content" not in self.model_fields_set:
            raise PydanticCustomError("no_content", "`content`: is required where there are no `tool_calls`")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("no_calls", "`tool_calls`: only messages of the role assistant have them")
        return self

    def for_template(self) -> Json:
        """As chat templates know messages: arguments of calls are objects, not the text of one."""
        message = self.model_dump()
        for call in message["tool_calls"] or ():
            call["function"]["arguments"] = _as_object(call["function"]["arguments"])
        return message


def _as_object(arguments: str | Json) -> str | Json:
    """What is no JSON object stays as it is: a model may have written it so."""
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
