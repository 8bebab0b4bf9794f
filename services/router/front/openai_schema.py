"""What clients send: the fields of OpenAI's requests that are served, and those that are refused by name.

A field is one of three: served (declared on a model here), known but not served (`UNSUPPORTED`: accepted only at the
value that changes nothing), or unknown (refused). None is silently ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from common.errors import InvalidRequestError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 16
MAX_LOGIT_BIASES = 1024
MAX_PROMPTS = 1024
"""In the schema; how many are served together is a setting."""
MAX_MESSAGES = 4096
"""And parts of one message."""
MAX_NAME_CHARACTERS = 1024
MAX_FIELDS = 64
"""Of any object: more than a request has, served or not. Else each unknown one would be complained of."""

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None,),  # checked against `n` on completions, where it exists
    "continue_final_message": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_json": (None,),
    "length_penalty": (None, 1),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""Fields that OpenAI's or vLLM's clients know, with the values at which they ask for nothing."""


def _described(description: str) -> WrapValidator:
    """Replaces the error of every branch of a union by one sentence."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("wrong_type", "must be {description}", {"description": description}) from error

    return WrapValidator(validate)


# Lists fail fast: a message for each of the millions of wrong items that a body can hold takes gigabytes.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]
Prompt = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)],
    Field(union_mode="left_to_right"),
    _described(f"a string, a list of token ids (whole numbers from 0) or a list of up to {MAX_PROMPTS} of either"),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None,
    _described(f"a string of 1 to {MAX_STOP_CHARACTERS} characters or a list of up to {MAX_STOP_STRINGS} such strings"),
]
LogitBias = Annotated[
    Annotated[
        dict[Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MAX_LOGIT_BIASES),
    ]
    | None,
    _described(f"a map of up to {MAX_LOGIT_BIASES} token ids, written as strings, to numbers from -100 to 100"),
]


class _Strict(BaseModel):
    """Types are what JSON says: no "1" for 1, no true for 1, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, fields: object) -> object:
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"must have at most {MAX_FIELDS} fields")
        return fields


class StreamOptions(_Strict):
    """Only with `stream`."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationFields(_Strict):
    """What both kinds of request share."""

    model: Name
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    """0 and -1: off."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """As in vLLM: tokens less likely than this times the likeliest one are left out."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """This and `presence_penalty` as in OpenAI's API: over the tokens generated so far."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """As in transformers and vLLM: over prompt and generated tokens; 1 is off."""
    logit_bias: LogitBias = None
    min_tokens: int | None = Field(default=None, ge=0)
    """As in vLLM: nothing but `max_tokens` ends a choice before it has so many tokens."""
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    """Ids that the model's vocabulary does not have end nothing, as in vLLM."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    """As in vLLM: choices carry `token_ids`, and the first of a prompt its `prompt_token_ids`."""
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None

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


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or many, as a list."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return cast("list[str] | list[list[int]]", prompt)


class TextPart(_Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)],
    _described(f'a string or a list of up to {MAX_MESSAGES} {{"type": "text", "text": ...}} parts'),
]


class ChatMessage(_Strict):
    """One turn. Fields that replies carry and that say nothing (null, empty) may be sent back as they came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` is what OpenAI calls `system` since; most chat templates do not know it."""
    content: Content
    name: Name | None = None
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ChatCompletionRequest(GenerationFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_FIELDS)] | None = None
    """Variables for the chat template, for example {"enable_thinking": false}."""

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Request = TypeVar("Request", CompletionRequest, ChatCompletionRequest)


def parse_request(body: bytes, model: type[Request]) -> Request:
    """The request in `body`. Raises InvalidRequestError, which names the field if it is one field's fault."""
    try:
        # NaN is let in here, so that the field that it stands in can be named below.
        fields = from_json(body, allow_inf_nan=True)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object")
    _refuse_unsupported(fields)
    try:
        request = model.model_validate({name: value for name, value in fields.items() if name not in UNSUPPORTED})
    except ValidationError as error:
        raise _first_error(error) from error
    _check_combinations(request)
    return request


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    for name, neutral_values in UNSUPPORTED.items():
        if name not in fields:
            continue
        value = fields[name]
        if name == "best_of" and value == (fields.get("n") or 1) and type(value) is int:
            continue
        # `False == 0` in Python; in JSON they differ.
        same_kind = [neutral for neutral in neutral_values if isinstance(neutral, bool) == isinstance(value, bool)]
        if value not in same_kind:
            raise InvalidRequestError(f"`{name}` is not supported by this server; leave it out", name)


def _first_error(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    parameter = ""
    for part in first["loc"]:
        parameter += f"[{part}]" if isinstance(part, int) else f".{part}" if parameter else str(part)
    match first["type"]:
        case "extra_forbidden":
            known = parameter in CompletionRequest.model_fields or parameter in ChatCompletionRequest.model_fields
            message = "is not a field of this route" if known else "is not a field that this server knows"
        case "missing":
            message = "is required"
        case _:
            message = first["msg"]
    return InvalidRequestError(f"`{parameter}`: {message}" if parameter else f"the body {message}", parameter or None)


def _check_combinations(request: CompletionRequest | ChatCompletionRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("`stream_options` is only allowed with `stream`", "stream_options")
    if isinstance(request, CompletionRequest):
        if request.echo and request.logprobs is not None:
            raise InvalidRequestError("`echo` together with `logprobs` is not supported by this server", "echo")
        return
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequestError("`top_logprobs` is only allowed with `logprobs`: true", "top_logprobs")
    limits = (request.max_tokens, request.max_completion_tokens)
    if None not in limits and limits[0] != limits[1]:
        raise InvalidRequestError(
            "`max_tokens` and `max_completion_tokens` say different things; give one", "max_completion_tokens"
        )
