"""One HTTP request in the mesh: its choices run side by side, and their events come out as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from types import TracebackType

from common.errors import ExecutionError
from services.router.engine import Engine, GeneratedToken
from services.router.front.choice_stream import ChoiceEvent, ChoiceStream, PlannedChoice
from services.router.front.metrics import FrontMetrics
from services.router.front.tokenizer import TextTokenizer


class GenerationRun:
    """Starts on entering, and on leaving has cancelled in the mesh whatever was not finished.

    Events wait in a list if the client reads slowly; it is bounded by the tokens that the request may make.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        choices: Sequence[PlannedChoice],
        metrics: FrontMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._choices = [(planned, ChoiceStream(planned, tokenizer)) for planned in choices]
        self._metrics = metrics
        self._clock = clock
        self._started_s = clock()
        self._has_token = False
        self._num_unfinished = len(choices)
        self._events: list[ChoiceEvent] = []
        self._error: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> GenerationRun:
        self._tasks = [asyncio.create_task(self._pump(planned, stream)) for planned, stream in self._choices]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task, (_, stream) in zip(self._tasks, self._choices, strict=True):
            # A finished one may still be closing its iterator (a stop string): it must not be torn out of that.
            if stream.finish_reason is None:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def finished(self) -> bool:
        """Every choice has its finish reason, and every event was taken."""
        return self._num_unfinished == 0 and not self._events

    @property
    def num_completion_tokens(self) -> int:
        """So far, over all choices."""
        return sum(stream.num_tokens for _, stream in self._choices)

    async def next_events(self, timeout_s: float | None) -> list[ChoiceEvent]:
        """What came since the last call; waits for something, and returns [] if nothing came in `timeout_s`.

        Raises what the engine raised, once the events before it were taken. Not after `finished`.
        """
        if not self._events and self._error is None:
            await self._wait(timeout_s)
        if self._events:
            events, self._events = self._events, []
            return events
        if self._error is not None:
            raise self._error
        return []

    async def _wait(self, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        # A timer costs a tenth of what wait_for does, and this runs for every token.
        timer = None if timeout_s is None else loop.call_later(timeout_s, self._wake)
        try:
            await self._waiting
        finally:
            self._waiting = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def _pump(self, planned: PlannedChoice, stream: ChoiceStream) -> None:
        tokens = self._engine.generate(planned.request)
        last_s: float | None = None
        try:
            async for token in tokens:
                last_s = self._observe(last_s)
                self._take(stream, token)
                if stream.finish_reason is not None:
                    return
            raise ExecutionError("the mesh ended a choice without a finish reason")
        except Exception as error:  # kept for the reader of the events, who knows what to tell the client
            self._error = self._error or error
            self._wake()
        finally:
            await _close(tokens)

    def _take(self, stream: ChoiceStream, token: GeneratedToken) -> None:
        event = stream.push(token)
        if event is None:
            return
        self._events.append(event)
        if event.finish_reason is not None:
            self._num_unfinished -= 1
        self._wake()

    def _observe(self, last_s: float | None) -> float:
        now_s = self._clock()
        self._metrics.completion_tokens.inc()
        if last_s is not None:
            self._metrics.inter_token_s.observe(now_s - last_s)
        elif not self._has_token:
            self._has_token = True
            self._metrics.time_to_first_token_s.observe(now_s - self._started_s)
        return now_s


async def _close(tokens: AsyncIterator[GeneratedToken]) -> None:
    """Cancels in the mesh if tokens are still to come."""
    if isinstance(tokens, AsyncGenerator):
        await tokens.aclose()
