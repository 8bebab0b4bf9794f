"""What clients send: the fields of OpenAI's requests that are served, declared on models. Pure.

A field that is not served is refused by its name if it would change the answer, and else taken and named
(`unused_fields.py`).
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Set
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from common.errors import InvalidRequestError
from services.router.front.schema import unused_fields
from services.router.front.schema.unused_fields import Json, Sieve

MAX_NAME_CHARACTERS = 1024
MAX_FIELDS = 64
"""An object may have this many: more than a request has, served or not. Else each unknown one would be reported."""
MAX_MESSAGES = 4096
"""One message may have as many parts."""
MAX_TOOL_CALLS = 128
"""One message may have this many."""
MAX_STOP_STRINGS = 128
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 16
MAX_LOGIT_BIASES = 1024
MAX_PROMPTS = 1024
"""The schema allows this many; how many are served together is a setting."""


def described(description: str) -> WrapValidator:
    """Replaces the error of every branch of a union by one sentence."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("wrong_type", "must be {description}", {"description": description}) from error

    return WrapValidator(validate)


Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]


class Strict(BaseModel):
    """Types are what JSON says: no "1" for 1, no true for 1, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, fields: object) -> object:
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"must have at most {MAX_FIELDS} fields")
        return fields


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
    """One call of an earlier turn."""

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
        """Returns it as chat templates know messages: arguments of calls are objects, not the text of one."""
        message = self.model_dump()
        for call in message["tool_calls"] or ():
            call["function"]["arguments"] = _as_object(call["function"]["arguments"])
        return message


def _as_object(arguments: str | Json) -> str | Json:
    """Reads the arguments. What is not a JSON object stays as it is: a model may have written it so."""
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


# Lists fail fast: a message for each of the millions of wrong items that a body can hold takes gigabytes.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Prompt = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)],
    Field(union_mode="left_to_right"),
    described(f"a string, a list of token ids (whole numbers from 0) or a list of up to {MAX_PROMPTS} of either"),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None,
    described(f"a string of 1 to {MAX_STOP_CHARACTERS} characters or a list of up to {MAX_STOP_STRINGS} such strings"),
]
LogitBias = Annotated[
    Annotated[
        dict[Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MAX_LOGIT_BIASES),
    ]
    | None,
    described(f"a map of up to {MAX_LOGIT_BIASES} token ids, written as strings, to numbers from -100 to 100"),
]


class StreamOptions(Strict):
    """Options of a stream; elsewhere they ask for nothing."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`, every chunk tells the usage of its choice so far, as in vLLM."""


class GenerationFields(Strict):
    """The fields that both kinds of request share."""

    model: Name
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    """0 and -1 turn it off."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Tokens less likely than this times the likeliest one are left out, as in vLLM."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """This and `presence_penalty` look at the tokens generated so far, as in OpenAI's API."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """It looks at prompt and generated tokens, as in transformers and vLLM; 1 is off."""
    logit_bias: LogitBias = None
    min_tokens: int | None = Field(default=None, ge=0)
    """Nothing but `max_tokens` ends a choice before it has this many tokens, as in vLLM."""
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    """Ids that the model's vocabulary does not have end nothing, as in vLLM."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    """Choices carry `token_ids`, and the first of a prompt its `prompt_token_ids`, as in vLLM."""
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    """These three are checked and change nothing."""
    cache: Annotated[Literal["on", "off"] | None, described('"on" or "off"')] = None
    """`off`: it finds nothing that was computed for others, and others nothing of it."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)] | None = None
    """It finds only what was computed under the same one, and others its own only so; as in vLLM."""
    drafts: Annotated[Literal["on", "off"] | None, described('"on" or "off"')] = None
    """`off`: none of its tokens is guessed ahead. They are the same either way."""
    _left_out: tuple[str, ...] = PrivateAttr(default=())
    """Fields that were left out when the request was read, since they change nothing."""

    @property
    def unused_fields(self) -> tuple[str, ...]:
        """Names the fields that were accepted and change nothing."""
        checked = ("user", "safety_identifier", "prompt_cache_key")
        return (*self._left_out, *(name for name in checked if getattr(self, name) is not None))

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def has_running_usage(self) -> bool:
        options = self.stream_options
        return self.includes_usage and options is not None and options.continuous_usage_stats is True


class CompletionRequest(GenerationFields):
    """The body of POST /v1/completions."""

    route: ClassVar[str] = "completions"

    prompt: Prompt
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Returns the prompts, one or many, as a list."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return cast("list[str] | list[list[int]]", prompt)


class ChatCompletionRequest(GenerationFields):
    """The body of POST /v1/chat/completions."""

    route: ClassVar[str] = "chat"

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    reasoning_effort: Name | None = None
    """A variable for chat templates that know it; to others it says nothing."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_FIELDS)] | None = None
    """Variables for the chat template, for example {"enable_thinking": false}."""

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


_UNKNOWN_FIELD = "is not a field that this server knows"
_KNOWN_FIELDS = frozenset({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields})
Request = TypeVar("Request", CompletionRequest, ChatCompletionRequest)


def parse_object(body: bytes) -> Json:
    """Returns the fields of `body`; of several with one name the last. Raises InvalidRequestError if it is no JSON
    object."""
    try:
        # Some clients begin a text with a mark that says UTF-8, which readers of JSON may skip (RFC 8259, 8.1). NaN is
        # let in here, so that the field that it stands in can be named below.
        fields = from_json(body.removeprefix(BOM_UTF8), allow_inf_nan=True)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return fields


def parse_request(body: bytes, model: type[Request]) -> Request:
    """Returns the request in `body`. Raises InvalidRequestError, which names the field if it is one field's fault."""
    fields = parse_object(body)
    sieve = Sieve(MAX_FIELDS)
    kept = _sift(fields, model, sieve)
    try:
        request = model.model_validate(kept)
    except ValidationError as error:
        raise first_error(error, _KNOWN_FIELDS) from error
    _check_combinations(request)
    request._left_out = tuple(sieve.unused)
    return request


def _sift(fields: Json, model: type[BaseModel], sieve: Sieve) -> Json:
    """Leaves out what changes nothing, also in what is nested. What has no form that could be looked into stays."""
    served = set(model.model_fields)
    if not fields.get("stream"):
        served.discard("stream_options")
    fields = dict(fields)
    if type(fields.get("best_of")) is int and fields["best_of"] == fields.get("n"):
        del fields["best_of"]
    if model is CompletionRequest and fields.get("logprobs") is False:
        del fields["logprobs"]  # a number here, true or false in chats: some clients do not tell the routes apart
    kept = sieve.sift(fields, served, unused_fields.TAKEN, unused_fields.NEUTRAL)
    options, messages = kept.get("stream_options"), kept.get("messages")
    if isinstance(options, dict):
        taken = unused_fields.TAKEN_IN_STREAM_OPTIONS
        kept["stream_options"] = sieve.sift(options, StreamOptions.model_fields, taken, {}, "stream_options.")
    if "messages" in served and isinstance(messages, list) and len(messages) <= MAX_MESSAGES:
        kept["messages"] = [_sift_message(message, f"messages[{i}].", sieve) for i, message in enumerate(messages)]
    return kept


def _sift_message(message: object, place: str, sieve: Sieve) -> object:
    if not isinstance(message, dict):
        return message
    kept = sieve.sift(
        _with_one_reasoning(message, place),
        ChatMessage.model_fields,
        unused_fields.TAKEN_IN_MESSAGE,
        unused_fields.NEUTRAL_IN_MESSAGE,
        place,
    )
    for name, model, taken in (
        ("content", TextPart, unused_fields.TAKEN_IN_PART),
        ("tool_calls", ToolCall, unused_fields.TAKEN_IN_CALL),
    ):
        items = kept.get(name)
        if isinstance(items, list) and len(items) <= MAX_MESSAGES:
            kept[name] = [
                _sift_item(item, model, taken, f"{place}{name}[{i}].", sieve) if isinstance(item, dict) else item
                for i, item in enumerate(items)
            ]
    for i, call in enumerate(kept["tool_calls"] if isinstance(kept.get("tool_calls"), list) else ()):
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            taken, inside = unused_fields.TAKEN_IN_FUNCTION, f"{place}tool_calls[{i}].function."
            call["function"] = _sift_item(call["function"], CalledFunction, taken, inside, sieve)
    return kept


def _with_one_reasoning(message: Json, place: str) -> Json:
    """Returns the message with its reasoning under one name: vLLM has called it `reasoning` since, and some of its
    replies carry both. Raises InvalidRequestError if they differ."""
    reasoning, named_so_before = message.get("reasoning"), message.get("reasoning_content")
    if not isinstance(reasoning, str):
        return message
    if named_so_before not in (None, reasoning):
        raise InvalidRequestError(
            f"`{place}reasoning` and `reasoning_content` say different things; give one", f"{place}reasoning"
        )
    return {name: value for name, value in message.items() if name != "reasoning"} | {"reasoning_content": reasoning}


def _sift_item(item: Json, model: type[BaseModel], taken: Set[str], place: str, sieve: Sieve) -> Json:
    """Leaves out of a part or a call what changes nothing, nulls in fields that are served too.

    Raises InvalidRequestError for an unknown field. Not for one of an item of another kind: there the kind is wrong,
    which is said where the items are checked.
    """
    kept = {
        name: value
        for name, value in sieve.sift(item, model.model_fields, taken, {}, place).items()
        if value is not None
    }
    unknown = next((name for name in kept if name not in model.model_fields), None)
    if unknown is not None and item.get("type") in (None, "text", "function"):
        raise InvalidRequestError(f"`{place}{unknown}`: {_UNKNOWN_FIELD}", f"{place}{unknown}")
    return kept


def _check_combinations(request: CompletionRequest | ChatCompletionRequest) -> None:
    if isinstance(request, CompletionRequest):
        if request.echo and request.logprobs is not None:
            raise InvalidRequestError("`echo` together with `logprobs` is not supported by this server", "echo")
        return
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError("`top_logprobs` is only allowed with `logprobs`: true", "top_logprobs")
    limits = (request.max_tokens, request.max_completion_tokens)
    if None not in limits and limits[0] != limits[1]:
        raise InvalidRequestError(
            "`max_tokens` and `max_completion_tokens` say different things; give one", "max_completion_tokens"
        )


_VALIDATORS_WORDS = re.compile(r"^(?:Input|Value|String|Number|List|Dictionary|Object) should (be|have|match)")

_VALIDATORS_OBJECT = re.compile(r"a valid dictionary(?: or (?:an )?instance of \w+)?")


def first_error(error: ValidationError, known: frozenset[str]) -> InvalidRequestError:
    """Returns the first of the errors. `known` are the fields of a request that some route serves."""
    first = error.errors(include_url=False, include_input=False)[0]
    parameter = ""
    for part in first["loc"]:
        parameter += f"[{part}]" if isinstance(part, int) else f".{part}" if parameter else str(part)
    match first["type"]:
        case "extra_forbidden":
            message = "is not a field of this route" if parameter in known else _UNKNOWN_FIELD
        case "missing":
            message = "is required"
        case "no_content" | "no_calls":
            message = first["msg"]
            name, _, message = message.removeprefix("`").partition("`: ")
            parameter += f".{name}"
        case _:
            message = _VALIDATORS_WORDS.sub(r"must \1", first["msg"]).replace(" after validation", "")
            message = _VALIDATORS_OBJECT.sub("a JSON object", message)
    if not first["loc"]:
        return InvalidRequestError(f"the body {message}")
    return InvalidRequestError(f"`{parameter}`: {message}", parameter)
