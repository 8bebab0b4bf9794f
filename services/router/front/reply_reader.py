"""What one client gets of a request: events made anew from the tokens, but for those that it has already."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

from common.errors import InvalidRequestError, NotReadyError
from services.router.front.live_request import LiveRequest
from services.router.front.text.choice_stream import ChoiceEvent, ChoiceStream
from services.router.front.text.tokenizer import TextTokenizer


class RouterStoppingError(NotReadyError):
    """The router ends and the request goes on after its restart: the client may ask again."""


class ReplyReader:
    """An asynchronous context manager: leaving it says that this client is gone.

    Events wait as tokens of the request if the client reads slowly, which are bounded by what it may generate.
    """

    def __init__(
        self,
        live: LiveRequest,
        tokenizer: TextTokenizer,
        taken: Sequence[int],
        on_leave: Callable[[ReplyReader], Awaitable[None]],
    ) -> None:
        """`taken`: tokens by choice that the client has; events up to there are left out."""
        self.live = live
        self.taken = tuple(taken)
        wants_ids = live.asked.fields.return_token_ids is True
        self._streams = [
            ChoiceStream(choice.planned, tokenizer, is_event_each_token=wants_ids) for choice in live.choices
        ]
        self._on_leave = on_leave
        self._waiting: asyncio.Future[None] | None = None
        live.listeners.add(self)

    async def __aenter__(self) -> ReplyReader:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.live.listeners.discard(self)
        await self._on_leave(self)

    @property
    def finished(self) -> bool:
        """Every choice has its finish reason, and every event was taken."""
        return all(stream.finish_reason is not None for stream in self._streams)

    @property
    def num_completion_tokens(self) -> int:
        """So far, over all choices."""
        return sum(stream.num_tokens for stream in self._streams)

    def take_events(self) -> list[ChoiceEvent]:
        """What came since the last call."""
        events: list[ChoiceEvent] = []
        for choice, stream, taken in zip(self.live.choices, self._streams, self.taken, strict=True):
            while stream.finish_reason is None and stream.num_tokens < len(choice.tokens):
                event = stream.push(choice.tokens[stream.num_tokens])
                if event is not None and event.num_tokens > taken:
                    events.append(event)
            if choice.is_cut and stream.finish_reason is None:
                event = stream.cut()
                if event.num_tokens > taken:
                    events.append(event)
        return events

    async def next_events(self, timeout_s: float | None) -> list[ChoiceEvent]:
        """What came since the last call; waits for something, and returns [] if nothing came in `timeout_s`.

        Raises what the mesh raised, once the events before it were taken. At once [] when `finished`.
        """
        events = self.take_events()
        if not events and not self._is_settled():
            await self._wait(timeout_s)
            events = self.take_events()
        if not events and not self.finished:
            if self.live.error is not None:
                raise self.live.error
            if self.live.is_released:
                raise RouterStoppingError(
                    f"the router restarts; ask again for /v1/requests/{self.live.reply_id} in a moment"
                )
        return events

    def wake(self) -> None:
        """There is something new."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _is_settled(self) -> bool:
        return self.finished or self.live.error is not None or self.live.is_released

    async def _wait(self, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        # A timer costs a tenth of what wait_for does, and this runs for every token.
        timer = None if timeout_s is None else loop.call_later(timeout_s, self.wake)
        try:
            await self._waiting
        finally:
            self._waiting = None
            if timer is not None:
                timer.cancel()


def parse_event_id(text: str | None, num_choices: int) -> tuple[int, ...]:
    """Tokens by choice, of a Last-Event-ID; all 0 where there is none. Raises InvalidRequestError."""
    if not text:
        return (0,) * num_choices
    counts = text.split(",")
    if len(counts) != num_choices or not all(
        count.isascii() and count.isdecimal() and len(count) < 10 for count in counts
    ):
        raise InvalidRequestError(
            f"Last-Event-ID: must be {num_choices} counts of tokens with commas between them, as in an `id:` line of "
            "this stream",
            "last_event_id",
        )
    return tuple(map(int, counts))
