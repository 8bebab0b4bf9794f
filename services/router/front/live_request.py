"""One accepted HTTP request in the mesh, apart from any connection: its choices, and their tokens so far.

Text, stop strings and offsets follow from the tokens alone, so each client's `ReplyReader` makes them again, and leaves
out the events that the client has already.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import ExecutionError, InvalidRequestError, MoemeshError, NotReadyError, UnknownRequestError
from services.router.engine import Engine, RecoveryCounts, Token, TokenStream
from services.router.front.metrics import FrontMetrics
from services.router.front.planning import PlannedRequest
from services.router.front.text.choice_stream import ChoiceEvent, ChoiceStream, PlannedChoice
from services.router.front.text.detokenizer import Vocabulary
from services.router.journal.records import JournalledChoice


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """Says whose request it is, and what its client wants of it."""

    tenant: str
    """A hash of the authorization: a client with another one does not see the request."""
    client_request_id: str | None
    idempotency_key: str | None
    is_resumable: bool


class LiveChoice:
    """Holds the tokens of one choice, and knows whether more are to come."""

    def __init__(self, planned: PlannedChoice, vocabulary: Vocabulary) -> None:
        self.planned = planned
        self.tokens: list[Token] = []
        self.is_over = False
        self.is_cut = False
        """It is over with the tokens that it has, none of which is a last one."""
        self.request = planned.request
        # The mesh knows no text: where a stop string ends is seen here, also without listeners.
        self._watch = ChoiceStream(planned, vocabulary) if planned.stop_strings else None

    def accept(self, token: Token) -> None:
        """Adds the next token; there is none after the last."""
        assert not self.is_over
        self.tokens.append(token)
        if self._watch is not None:
            self._watch.push(token)
            self.is_over = self._watch.finish_reason is not None
        else:
            self.is_over = token.finish_reason is not None

    def cut(self) -> None:
        """Ends it here: it may not have more tokens than these."""
        self.is_over = self.is_cut = True

    def restore(self, record: JournalledChoice) -> None:
        """Brings back the tokens that the journal has; the choice goes on after them."""
        for token in record.tokens:
            if not self.is_over:  # the mesh may have made some behind a stop string
                self.accept(token)
        self.request = self.request.restored([token.token_id for token in self.tokens], record.sequence_id)


class LiveRequest:
    """Runs all choices of one request. It belongs to the event loop; `on_end` is called once, however it ends."""

    def __init__(
        self,
        planned: PlannedRequest,
        is_resumable: bool,
        engine: Engine,
        vocabulary: Vocabulary,
        metrics: FrontMetrics,
        clock: Callable[[], float],
        on_end: Callable[[LiveRequest], None],
    ) -> None:
        self.planned = planned
        self.is_resumable = is_resumable
        self.choices = [LiveChoice(choice, vocabulary) for choice in planned.choices]
        self.error: Exception | None = None
        self.has_ended = False
        self.is_released = False
        """The router ends and the request does not: its readers are sent away."""
        self.is_restored = False
        """A router before this one has begun it, and this one goes on."""
        self.receipt = 0
        """The journal's receipt for all its tokens, once it has ended."""
        self.listeners: set[ReplyReader] = set()
        self._engine = engine
        self._metrics = metrics
        self._clock = clock
        self._on_end = on_end
        self._started_s = clock()
        self._has_token = False
        self._tasks: dict[LiveChoice, asyncio.Task[None]] = {}
        self._begun: set[LiveChoice] = set()
        """Choices whose tasks have had their first turn: only those can be cancelled and still close what they read."""

    @property
    def reply_id(self) -> str:
        """Returns the name that it has everywhere."""
        return self.planned.identity.reply_id

    @property
    def recovery(self) -> RecoveryCounts:
        """Adds up the counts of all choices; a restart of the router counts once."""
        counts = [token.recovery for choice in self.choices for token in choice.tokens[-1:] if token.recovery]
        return RecoveryCounts(
            sum(count.recoveries for count in counts) + self.is_restored,
            sum(count.replayed_tokens for count in counts),
            sum(count.retried_calls for count in counts),
        )

    @property
    def num_cached_tokens(self) -> int:
        """Counts the prompt tokens that were found in the cache: of each prompt once, for its first choice."""
        first = (choice.tokens[:1] for choice in self.choices if choice.planned.request.choice == 0)
        return sum(token.num_cached_tokens for tokens in first for token in tokens)

    @property
    def num_accepted_drafts(self) -> int:
        """Counts the tokens that had been guessed, over all choices."""
        return sum(token.is_draft for choice in self.choices for token in choice.tokens)

    @property
    def num_rejected_drafts(self) -> int:
        """Counts the guesses that came to nothing, in the steps of its tokens."""
        return sum(token.num_rejected_drafts for choice in self.choices for token in choice.tokens)

    def start(self) -> None:
        """Asks the mesh for all choices that are not over."""
        for choice in self.choices:
            if not choice.is_over:
                self._tasks[choice] = asyncio.create_task(self._pump(choice, self._engine.generate(choice.request)))
        self._end_if_complete()

    def restore(self, journalled: Sequence[JournalledChoice], was_over: bool, counts_as_recovery: bool = True) -> None:
        """Starts it where a router before this one was; `journalled` has a record for each choice.

        A choice that has more tokens than it may have by now (the context got smaller) ends with them; a request that
        has no room at all any more, and more to come, fails. `was_over`: it had ended before; then it stays so.
        `counts_as_recovery`: a router before this one has begun it.
        """
        self.is_restored = counts_as_recovery
        for choice, record in zip(self.choices, journalled, strict=True):
            choice.restore(record)
            self.error = self.error or record.error
        self._has_token = any(choice.tokens for choice in self.choices)
        unfinished = [choice for choice in self.choices if not choice.is_over]
        if unfinished and not was_over:
            self.error = self.error or self.planned.misfit
        if self.error is not None:
            self._end()
            return
        for choice in unfinished:
            if was_over or len(choice.tokens) >= choice.planned.request.sampling.max_tokens:
                choice.cut()
        self.start()

    async def cancel(self) -> None:
        """Takes it out of the mesh. Clients that still listen are told."""
        self.fail(UnknownRequestError(f"the request {self.reply_id} was cancelled"))
        await self.settle()

    def fail(self, error: MoemeshError) -> None:
        """Ends it with this error, unless it has ended."""
        if not self.has_ended:
            self.error = error
            self._end()

    async def abandon(self) -> None:
        """Stops it without an end, since the router ends and the request does not."""
        self.has_ended = True
        self._stop_choices()
        await self.settle()

    def release(self) -> None:
        """Sends the readers away."""
        self.is_released = True
        self._wake()

    async def settle(self) -> None:
        """Waits until the mesh has been told of all that is over."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _pump(self, choice: LiveChoice, tokens: TokenStream) -> None:
        last_s: float | None = None
        self._begun.add(choice)
        try:
            if self.has_ended:
                return  # before its first turn: the mesh may have the choice already
            async for token in tokens:
                last_s = self._observe(last_s)
                choice.accept(token)
                self._wake()
                if choice.is_over:
                    self._end_if_complete()
                    return
            raise ExecutionError("the mesh ended a choice without a finish reason")
        except Exception as error:  # kept for the readers, which know what to tell their clients
            if not self.has_ended:
                self.error = error
                self._end()
        finally:
            await tokens.aclose()  # it is cancelled in the mesh if tokens are still to come

    def _end_if_complete(self) -> None:
        if not self.has_ended and all(choice.is_over for choice in self.choices):
            self._end()

    def _end(self) -> None:
        self.has_ended = True
        if self.error is None and not self.is_restored:
            self._metrics.request_s.observe(self._clock() - self._started_s)
        self._stop_choices()
        self._on_end(self)
        self._wake()

    def _stop_choices(self) -> None:
        current = asyncio.current_task()
        for choice, task in self._tasks.items():
            # One that is over may still be closing its iterator (a stop string): it must not be torn out of that. One
            # that was not begun ends at its first turn: cancelled before, it would run none of its own ending.
            if not choice.is_over and task is not current and choice in self._begun:
                task.cancel()

    def _wake(self) -> None:
        for listener in self.listeners:
            listener.wake()

    def _observe(self, last_s: float | None) -> float:
        now_s = self._clock()
        self._metrics.completion_tokens.inc()
        if last_s is not None:
            self._metrics.inter_token_s.observe(now_s - last_s)
        elif not self._has_token:
            self._has_token = True
            self._metrics.time_to_first_token_s.observe(now_s - self._started_s)
        return now_s


class RouterStoppingError(NotReadyError):
    """The router ends, and the request goes on after its restart: the client may ask again."""


class ReplyReader:
    """Makes the events of one client.

    If the client reads slowly, events wait as tokens of the request, which are bounded by what it may generate.
    """

    def __init__(self, live: LiveRequest, vocabulary: Vocabulary, received: Sequence[int]) -> None:
        """`received` counts the tokens of each choice that the client has; events up to there are left out."""
        self.live = live
        self.received = tuple(received)
        wants_ids = live.planned.fields.return_token_ids is True
        self._streams = [
            ChoiceStream(choice.planned, vocabulary, is_event_each_token=wants_ids) for choice in live.choices
        ]
        self._waiting: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._give_up_s = 0.0
        """When the wait that is under way will have been long enough, on the loop's clock."""

    @property
    def finished(self) -> bool:
        """Says whether every choice has its finish reason, and every event was given out."""
        return all(stream.finish_reason is not None for stream in self._streams)

    @property
    def num_completion_tokens(self) -> int:
        """Counts the tokens so far, over all choices."""
        return sum(stream.num_tokens for stream in self._streams)

    def pop_events(self) -> list[ChoiceEvent]:
        """Returns the events that came since the last call."""
        events: list[ChoiceEvent] = []
        for choice, stream, received in zip(self.live.choices, self._streams, self.received, strict=True):
            made: list[ChoiceEvent | None] = []
            while stream.finish_reason is None and stream.num_tokens < len(choice.tokens):
                made.append(stream.push(choice.tokens[stream.num_tokens]))
            if choice.is_cut and stream.finish_reason is None:
                made.append(stream.cut())
            events += [event for event in made if event is not None and event.num_tokens > received]
        return events

    async def next_events(self, timeout_s: float | None) -> list[ChoiceEvent]:
        """Returns the events that came since the last call. It waits for some, and returns [] if none came in
        `timeout_s`.

        Raises what the mesh raised, once the events before it were given out. Returns [] at once when `finished`.
        """
        events = self.pop_events()
        if not events and not self._is_settled():
            await self._wait(timeout_s)
            events = self.pop_events()
        if not events and not self.finished:
            if self.live.error is not None:
                raise self.live.error
            if self.live.is_released:
                raise RouterStoppingError(
                    f"the router restarts; ask again for /v1/requests/{self.live.reply_id} in a moment"
                )
        return events

    def wake(self) -> None:
        """Wakes the reader that waits for events, since there is something new."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _is_settled(self) -> bool:
        return self.finished or self.live.error is not None or self.live.is_released

    def close(self) -> None:
        """Ends its timer; nothing is waited for any more."""
        if self._timer is not None:
            self._timer.cancel()

    async def _wait(self, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        self._give_up_s = math.inf if timeout_s is None else loop.time() + timeout_s
        if self._timer is not None and self._timer.when() > self._give_up_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and timeout_s is not None:
            self._timer = loop.call_at(self._give_up_s, self._look_at_time)
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _look_at_time(self) -> None:
        """Wakes the reader if its wait has been long enough. One timer serves many waits: a wait is for a token, and
        most end long before it."""
        self._timer = None
        loop = asyncio.get_running_loop()
        if self._waiting is None or self._give_up_s == math.inf:
            return
        if loop.time() < self._give_up_s:
            self._timer = loop.call_at(self._give_up_s, self._look_at_time)
        else:
            self.wake()


def parse_event_id(text: str | None, num_choices: int) -> tuple[int, ...]:
    """Reads the tokens of each choice from a Last-Event-ID, 0 where there is none. Raises InvalidRequestError."""
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
