"""What goes back to clients, in OpenAI's shapes: whole replies, stream chunks, errors.

A streamed token costs one small string join: everything around it is encoded once per request.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import MoemeshError, RequestError
from services.router.engine import FinishReason
from services.router.front.planning import PlannedRequest
from services.router.front.schema.openai_schema import ChatCompletionRequest
from services.router.front.text.choice_stream import ChoiceEvent, TokenLogprob
from services.router.front.text.detokenizer import Vocabulary

JsonObject = dict[str, Any]
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_LOWEST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's value

DONE_EVENT = b"data: [DONE]\n\n"
KEEP_ALIVE_COMMENT = b": keep-alive\n\n"


def running_usage(num_prompt_tokens: int, num_completion_tokens: int) -> JsonObject:
    """Returns OpenAI's counts alone."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What a complete reply took, over all its choices."""

    completion: int
    cached: int
    """Of the prompts' tokens, those that were found in the cache."""
    accepted_drafts: int
    """Of the completion's tokens, those that had been guessed."""
    rejected_drafts: int
    """Guesses that came to nothing."""


def usage_of(planned: PlannedRequest, counts: TokenCounts, extension: JsonObject | None) -> JsonObject:
    """Returns OpenAI's usage object of a reply that is complete, with `extension` as what is not OpenAI's. Drafts show
    where there were any; those that were rejected are no completion tokens."""
    usage = running_usage(planned.num_prompt_tokens, counts.completion)
    usage["prompt_tokens_details"] = {"cached_tokens": counts.cached}
    if counts.accepted_drafts or counts.rejected_drafts:
        usage["completion_tokens_details"] = {
            "accepted_prediction_tokens": counts.accepted_drafts,
            "rejected_prediction_tokens": counts.rejected_drafts,
        }
    return usage if extension is None else {**usage, "moemesh": extension}


def encode_json(value: object) -> bytes:
    """Returns compact UTF-8."""
    return _ENCODER.encode(value).encode()


def error_body(error: Exception) -> JsonObject:
    """Returns OpenAI's error object. What is not a MoemeshError is a defect here, and its text is not for clients."""
    if not isinstance(error, MoemeshError):
        fields = {"message": "internal error", "type": "server_error", "param": None, "code": "internal_error"}
        return {"error": fields}
    parameter = error.parameter if isinstance(error, RequestError) else None
    return {"error": {"message": error.message, "type": error.openai_type, "param": parameter, "code": error.code}}


def error_event(error: Exception) -> bytes:
    """Returns the event of an error in mid-stream."""
    return b"data: " + encode_json(error_body(error)) + b"\n\n"


class ReplyForm(ABC):
    """What differs between completions and chats."""

    whole_object: str
    chunk_object: str

    def __init__(self, vocabulary: Vocabulary, with_logprobs: bool) -> None:
        self._vocabulary = vocabulary
        self._with_logprobs = with_logprobs

    @abstractmethod
    def whole_choice(self, event: ChoiceEvent) -> JsonObject:
        """Returns the choice of a reply that is not streamed; `event` holds all of it."""

    def opening_choices(self, num_choices: int) -> list[JsonObject]:
        """Returns the chunks that come before the first token: none."""
        return []

    @abstractmethod
    def chunk_choices(self, event: ChoiceEvent, is_one: bool = False) -> list[JsonObject]:
        """Returns the chunks of an event; with `is_one` never more, so that no client can have got half of them."""

    @abstractmethod
    def text_affixes(self, index: int) -> tuple[str, str]:
        """Returns the JSON before and after the text, in the choice of a chunk that holds text and nothing else."""


class CompletionForm(ReplyForm):
    """The form of /v1/completions."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole_choice(self, event: ChoiceEvent) -> JsonObject:
        return {
            "index": event.index,
            "text": event.text,
            "logprobs": self._logprobs(event.logprobs) if self._with_logprobs else None,
            "finish_reason": event.finish_reason,
        }

    def chunk_choices(self, event: ChoiceEvent, is_one: bool = False) -> list[JsonObject]:
        return [self.whole_choice(event)]

    def text_affixes(self, index: int) -> tuple[str, str]:
        return f'{{"index":{index},"text":', ',"logprobs":null,"finish_reason":null}'

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> JsonObject:
        """Returns the four lists of OpenAI's; `tokens` are what each token added to the text, so together they are the
        text."""
        return {
            "tokens": [token.text for token in logprobs],
            "token_logprobs": [_finite(token.logprob) for token in logprobs],
            "top_logprobs": [self._top(token) for token in logprobs],
            "text_offset": [token.text_offset for token in logprobs],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """Names the likeliest tokens by their text, and the drawn one by the text that it has in `tokens`."""
        values: dict[str, float] = {}
        for token_id, logprob in token.top_logprobs:
            # Two ids may read alike: the likelier one stays.
            name = token.text if token_id == token.token_id else self._name(token_id)
            values.setdefault(name, _finite(logprob))
        return values | {token.text: _finite(token.logprob)}

    def _name(self, token_id: int) -> str:
        text = self._vocabulary.token_text(token_id)
        return text if self._vocabulary.is_text(token_id) else f"bytes:{text}"


class ChatForm(ReplyForm):
    """The form of /v1/chat/completions."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole_choice(self, event: ChoiceEvent) -> JsonObject:
        return {
            "index": event.index,
            "message": {"role": "assistant", "content": event.text, "refusal": None},
            "logprobs": self._logprobs(event.logprobs) if self._with_logprobs else None,
            "finish_reason": event.finish_reason,
        }

    def opening_choices(self, num_choices: int) -> list[JsonObject]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta, (), None) for index in range(num_choices)]

    def chunk_choices(self, event: ChoiceEvent, is_one: bool = False) -> list[JsonObject]:
        chunks: list[JsonObject] = []
        if is_one:
            delta = {"content": event.text} if event.text or event.logprobs else {}
            return [self._chunk(event.index, delta, event.logprobs, event.finish_reason)]
        if event.text or event.logprobs or event.finish_reason is None:
            chunks.append(self._chunk(event.index, {"content": event.text}, event.logprobs, None))
        if event.finish_reason is not None:
            chunks.append(self._chunk(event.index, {}, (), event.finish_reason))
        return chunks

    def text_affixes(self, index: int) -> tuple[str, str]:
        return f'{{"index":{index},"delta":{{"content":', '},"logprobs":null,"finish_reason":null}'

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, str],
        logprobs: Sequence[TokenLogprob],
        finish_reason: FinishReason | None,
    ) -> JsonObject:
        shown = self._logprobs(logprobs) if logprobs else None
        return {"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish_reason}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> JsonObject:
        content = [
            {
                **self._entry(token.token_id, token.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in token.top_logprobs],
            }
            for token in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> JsonObject:
        return {
            "token": self._vocabulary.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._vocabulary.token_bytes(token_id)),
        }


def create_form(planned: PlannedRequest, vocabulary: Vocabulary) -> ReplyForm:
    """Returns the form of the route that the request came by."""
    form_class = ChatForm if isinstance(planned.fields, ChatCompletionRequest) else CompletionForm
    return form_class(vocabulary, planned.fields.num_top_logprobs is not None)


class ChunkEncoder:
    """Turns the events of one stream into the bytes of server-sent events."""

    def __init__(self, planned: PlannedRequest, form: ReplyForm, received: Sequence[int] | None = None) -> None:
        """`received` counts the tokens of each choice that the client has; then each chunk with tokens carries an id
        like it."""
        self._form = form
        self._planned = planned
        self._with_token_ids = planned.fields.return_token_ids is True
        self._with_usage = planned.fields.includes_usage
        self._with_running_usage = planned.fields.has_running_usage
        self._received = None if received is None else list(received)
        self._prefix = f'data: {_ENCODER.encode(_head(planned, form.chunk_object))[:-1]},"choices":['
        # With `include_usage`, OpenAI puts a null into every chunk but the last.
        self._suffix = '],"usage":null}\n\n' if self._with_usage else "]}\n\n"
        self._affixes: dict[int, tuple[str, str]] = {}

    def opening(self) -> bytes:
        """Returns what comes before the first token: nothing for a client that has tokens."""
        if any(self._received or ()):
            return b""
        choices = self._form.opening_choices(len(self._planned.choices))
        return b"".join(self._chunk(choice, self._suffix_of(choice["index"], 0)) for choice in choices)

    def event(self, event: ChoiceEvent) -> bytes:
        """Returns the chunks of one event."""
        data = self._chunks(event)
        if self._received is None:
            return data
        self._received[event.index] = event.num_tokens
        return f"id: {','.join(map(str, self._received))}\n".encode() + data

    def _chunks(self, event: ChoiceEvent) -> bytes:
        suffix = self._suffix_of(event.index, event.num_generated_tokens)
        if event.finish_reason is None and not event.logprobs and not self._with_token_ids:
            affixes = self._affixes.get(event.index)
            if affixes is None:
                before, after = self._form.text_affixes(event.index)
                affixes = self._affixes[event.index] = (self._prefix + before, after)
            return (affixes[0] + _ENCODER.encode(event.text) + affixes[1] + suffix).encode()
        choices = self._form.chunk_choices(event, is_one=self._received is not None)
        if self._with_token_ids:
            self._add_token_ids(choices[0], event)
        return b"".join(self._chunk(choice, suffix) for choice in choices)

    def usage(self, counts: TokenCounts, extension: JsonObject) -> bytes:
        """Returns the last chunk if the client asked for it, else b""."""
        if not self._with_usage:
            return b""
        usage = _ENCODER.encode(usage_of(self._planned, counts, extension))
        return f'{self._prefix}],"usage":{usage}}}\n\n'.encode()

    def _chunk(self, choice: JsonObject, suffix: str) -> bytes:
        return (self._prefix + _ENCODER.encode(choice) + suffix).encode()

    def _suffix_of(self, index: int, num_tokens: int) -> str:
        if not self._with_running_usage:
            return self._suffix
        num_prompt_tokens = len(self._planned.choices[index].request.prompt_token_ids)
        return f'],"usage":{_ENCODER.encode(running_usage(num_prompt_tokens, num_tokens))}}}\n\n'

    def _add_token_ids(self, choice: JsonObject, event: ChoiceEvent) -> None:
        choice["token_ids"] = event.token_ids
        if event.num_tokens == len(event.token_ids):
            choice["prompt_token_ids"] = self._planned.choices[event.index].request.prompt_token_ids


def whole_reply(
    planned: PlannedRequest, form: ReplyForm, events: Sequence[ChoiceEvent], usage: JsonObject
) -> JsonObject:
    """Returns the reply that is not streamed. `events` has one for each choice, by index, with all of the choice."""
    choices = [form.whole_choice(event) for event in events]
    if planned.fields.return_token_ids is True:
        for choice, event in zip(choices, events, strict=True):
            choice["token_ids"] = event.token_ids
            choice["prompt_token_ids"] = planned.choices[event.index].request.prompt_token_ids
    return {**_head(planned, form.whole_object), "choices": choices, "usage": usage}


def _head(planned: PlannedRequest, object_name: str) -> JsonObject:
    """Returns what all chunks of one reply share. The model has the name that the request asked for: what was accepted
    under another name goes on under that one."""
    return {
        "id": planned.identity.reply_id,
        "object": object_name,
        "created": planned.identity.created_s,
        "model": planned.fields.model,
        "system_fingerprint": planned.system_fingerprint,
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
