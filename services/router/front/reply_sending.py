"""A request's events to one client: as a whole reply, as a stream, or as what there is so far."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack

from starlette.responses import Response

from services.router.front.http.answers import json_answer, log_error
from services.router.front.http.exchange import EventStreamResponse
from services.router.front.live_request import LiveRequest
from services.router.front.replies import (
    DONE_EVENT,
    KEEP_ALIVE_COMMENT,
    ChunkEncoder,
    JsonObject,
    error_body,
    error_event,
    whole_reply,
)
from services.router.front.reply_reader import ReplyReader, RouterStoppingError
from services.router.front.text.choice_stream import ChoiceEvent, merge_events
from services.router.front.usage import Outcome, usage_of


class ReplySender:
    """Keeps nothing between requests. Every method takes a reader that the caller has entered."""

    def __init__(self, is_durable: Callable[[LiveRequest], bool], keep_alive_interval_s: float) -> None:
        """`is_durable`: whether all tokens of a request that its clients have are in the journal."""
        self._is_durable = is_durable
        self._keep_alive_interval_s = keep_alive_interval_s

    async def whole(self, reader: ReplyReader, headers: dict[str, str]) -> Response:
        """Waits for all of it. Raises what the mesh raised."""
        events: list[list[ChoiceEvent]] = [[] for _ in reader.live.choices]
        while not reader.finished:
            for event in await reader.next_events(timeout_s=None):
                events[event.index].append(event)
        return json_answer(self._reply(reader, events), headers=headers)

    async def stream(
        self, reader: ReplyReader, stack: AsyncExitStack, has_ids: bool, headers: dict[str, str]
    ) -> Response:
        """Waits for the first token or error, so that an error still has its HTTP status; but not longer than a pause
        may be on the line. From then on the response owns what is on the stack. Raises what the mesh raised."""
        asked = reader.live.asked
        encoder = ChunkEncoder(
            asked.head,
            asked.form,
            asked.plan,
            asked.fields.includes_usage,
            asked.fields.return_token_ids is True,
            reader.taken if has_ids else None,
            with_running_usage=asked.fields.has_running_usage,
        )
        first = await reader.next_events(self._keep_alive_interval_s)
        return EventStreamResponse(self._events(reader, encoder, first), stack.pop_all().aclose, headers)

    def state(self, reader: ReplyReader) -> JsonObject:
        """What there is so far, and the whole reply or the error once it has ended."""
        live = reader.live
        events: list[list[ChoiceEvent]] = [[] for _ in live.choices]
        for event in reader.take_events():
            events[event.index].append(event)
        if reader.finished:
            state = "finished"
        else:
            state = "running" if live.error is None else "failed"
        return {
            "id": live.reply_id,
            "object": "moemesh.request",
            "created": live.asked.head.created_s,
            "state": state,
            "choices": [_choice_so_far(live, index, of_choice) for index, of_choice in enumerate(events)],
            "reply": self._reply(reader, events) if reader.finished else None,
            "error": None if live.error is None or reader.finished else error_body(live.error)["error"],
        }

    async def _events(
        self, reader: ReplyReader, encoder: ChunkEncoder, first: list[ChoiceEvent]
    ) -> AsyncGenerator[bytes]:
        events, opening = first, encoder.opening()
        try:
            while True:
                yield opening + b"".join(map(encoder.event, events)) or KEEP_ALIVE_COMMENT
                if reader.finished:
                    break
                opening = b""
                events = await reader.next_events(self._keep_alive_interval_s)
            yield encoder.usage(self._outcome(reader)) + DONE_EVENT
        except RouterStoppingError:
            return  # without [DONE]: the client comes back for the rest
        except Exception as error:
            log_error(error)
            yield error_event(error) + DONE_EVENT

    def _reply(self, reader: ReplyReader, events: list[list[ChoiceEvent]]) -> JsonObject:
        live = reader.live
        asked = live.asked
        is_extended = live.identity.is_resumable or asked.fields.includes_usage
        return whole_reply(
            asked.head,
            asked.form,
            asked.plan,
            [merge_events(of_choice) for of_choice in events],
            asked.fields.return_token_ids is True,
            usage_of(asked.plan, self._outcome(reader), is_extended),
        )

    def _outcome(self, reader: ReplyReader) -> Outcome:
        return Outcome(reader.num_completion_tokens, reader.live.recovery, self._is_durable(reader.live))


def _choice_so_far(live: LiveRequest, index: int, events: list[ChoiceEvent]) -> JsonObject:
    tokens = live.choices[index].tokens
    return {
        "index": index,
        "num_tokens": len(tokens),
        "token_ids": [token.token_id for token in tokens],
        "text": "".join(event.text for event in events),
        "finish_reason": events[-1].finish_reason if events else None,
    }
