"""Clients of the public API: streams that are read to their end, over breaks where the server keeps them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from chaos.record.history import (
    Abandoned,
    Asked,
    ChoiceFinished,
    ConnectionBroken,
    Ended,
    Event,
    Reattached,
    RequestFailed,
    RequestRefused,
    Tokens,
    logprob_bits,
)
from chaos.record.requests import ChaosRequest, SuiteLoad
from chaos.record.sse import DONE, EventParser, ServerEvent, split_lines_async

REQUEST_ID_HEADER = "Moemesh-Request-Id"
RETRY_PAUSE_S = 0.1
CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 30.0
"""The server comments every few seconds in a pause; a connection that says nothing for this long is broken."""
BUSY_STATUSES = (429, 503)


class BrokenStreamError(Exception):
    """The connection ended without an end of the answer."""


@dataclass(slots=True)
class StreamingClient:
    """It asks for one completion after another. `record` gets everything that it sees."""

    http: httpx.AsyncClient
    url: str
    model: str
    settings: SuiteLoad
    record: Callable[[Event], None]
    clock: Callable[[], float]
    is_cold: bool = False
    """It asks for nothing that was computed for others or guessed: what it gets is what they are held against."""

    async def ask(self, operation: str, stream: int, request: ChaosRequest) -> None:
        """Runs one operation from asking to its end, whatever the end is. Raises nothing that the server may cause."""
        self.record(
            Asked(
                at_s=self.clock(),
                operation=operation,
                stream=stream,
                request=request.name,
                body_sha256=request.body_sha256(self.model),
                kind=request.kind,
                num_choices=request.num_choices,
                max_tokens=request.max_tokens,
            )
        )
        answer = AnswerRecorder(operation, request.num_choices, self.record, self.clock)
        asked_s = self.clock()
        try:
            async with asyncio.timeout(self.settings.request_deadline_s):
                await self._read_to_the_end(answer, request)
        except TimeoutError:
            self.record(Abandoned(self.clock(), operation, self.clock() - asked_s))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            answer.fail("unreadable", f"the server sent what cannot be read: {error}")

    async def _read_to_the_end(self, answer: AnswerRecorder, request: ChaosRequest) -> None:
        connection = _Connection(self, answer, request)
        broke_s: float | None = None
        while not answer.is_over:
            try:
                await connection.read()
            except (httpx.TransportError, BrokenStreamError) as error:
                reason = f"{type(error).__name__}: {error}"
                self.record(ConnectionBroken(self.clock(), answer.operation, reason))
                broke_s = self.clock() if broke_s is None or connection.has_progressed else broke_s
                if connection.has_headers and not connection.request_id:
                    answer.fail("connection_lost", f"{reason}; the server keeps no streams")
                    return
            except _BusyError as busy:
                self.record(RequestRefused(self.clock(), answer.operation, busy.status, busy.message))
                broke_s = self.clock() if broke_s is None else broke_s
            connection.has_progressed = False
            if not answer.is_over:
                if broke_s is not None and self.clock() - broke_s > self.settings.reattach_within_s:
                    answer.fail("connection_lost", f"not back within {self.settings.reattach_within_s:g} s")
                    return
                await asyncio.sleep(RETRY_PAUSE_S)


class _BusyError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(slots=True)
class AnswerRecorder:
    """One answer as its client puts it together, over as many connections as it takes; all of it goes into the record.

    Offsets count what this client has got.
    """

    operation: str
    num_choices: int
    record: Callable[[Event], None]
    clock: Callable[[], float]
    last_event_id: str = ""
    """The id of the last event that came; a new connection goes on after it."""
    is_over: bool = False
    _counts: list[int] = field(default_factory=list)
    _texts: list[Any] = field(default_factory=list)
    _finished: set[int] = field(default_factory=set)
    _usage: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._counts = [0] * self.num_choices
        self._texts = [hashlib.sha256() for _ in range(self.num_choices)]

    def add(self, event: ServerEvent) -> None:
        """Records a chunk, an error, or the end."""
        if self.is_over:
            return
        if event.data == DONE:
            self._end()
        else:
            self._add_chunk(json.loads(event.data))
        self.last_event_id = event.event_id

    def fail(self, code: str, message: str, status: int = 0) -> None:
        """Records that the answer is over without its rest."""
        self.is_over = True
        self.record(RequestFailed(self.clock(), self.operation, code, message, status))

    def _add_chunk(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            error = chunk["error"]
            self.fail(str(error.get("code") or error.get("type")), str(error.get("message")))
            return
        self._usage |= chunk.get("usage") or {}
        for name in chunk.keys() & {"moemesh"}:
            self._usage[name] = chunk[name]
        for choice in chunk.get("choices", ()):
            self._add_choice(choice)

    def _add_choice(self, choice: dict[str, Any]) -> None:
        index = int(choice["index"])
        token_ids = tuple(choice.get("token_ids") or ())
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
        self._texts[index].update((choice.get("text") or "").encode())
        if token_ids:
            bits = tuple(logprob_bits(float(value)) for value in logprobs)
            self.record(Tokens(self.clock(), self.operation, index, self._counts[index], token_ids, bits))
            self._counts[index] += len(token_ids)
        if choice.get("finish_reason"):
            self._finished.add(index)
            text = self._texts[index].hexdigest()
            self.record(ChoiceFinished(self.clock(), self.operation, index, choice["finish_reason"], text))

    def _end(self) -> None:
        if len(self._finished) < self.num_choices:
            self.fail("ended_early", f"[DONE], and {self.num_choices - len(self._finished)} choices have no end")
            return
        self.is_over = True
        self.record(Ended(self.clock(), self.operation, self._usage))


@dataclass(slots=True)
class _Connection:
    """One connection of an answer after another."""

    client: StreamingClient
    answer: AnswerRecorder
    request: ChaosRequest
    request_id: str = ""
    has_headers: bool = False
    """The answer has begun: asking anew would begin another one."""
    has_progressed: bool = False

    async def read(self) -> None:
        """Reads until the answer is over. Raises httpx.TransportError, BrokenStreamError, _BusyError."""
        async with self._open() as response:
            if response.is_error:
                await self._receive_refusal(response)
                return
            if self.has_headers:
                self.client.record(Reattached(self.client.clock(), self.answer.operation, self.answer.last_event_id))
            self.has_headers = True
            self.request_id = response.headers.get(REQUEST_ID_HEADER, self.request_id)
            parser = EventParser(self.answer.last_event_id)
            async for line in split_lines_async(response.aiter_bytes()):
                event = parser.add(line)
                if event is not None:
                    self.has_progressed = True
                    self.answer.add(event)
        if not self.answer.is_over:
            raise BrokenStreamError("the connection was closed in mid-answer")

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[httpx.Response]:
        client = self.client
        if self.has_headers:
            headers = {"Last-Event-ID": self.answer.last_event_id} if self.answer.last_event_id else {}
            url = f"{client.url}/v1/requests/{self.request_id}/events"
            async with client.http.stream("GET", url, headers=headers) as response:
                yield response
            return
        headers = {"Idempotency-Key": self.answer.operation}
        if client.settings.resumable:
            headers["Moemesh-Resumable"] = "1"
        if client.is_cold or self.request.is_salted:
            headers["Moemesh-Cache-Salt"] = self.answer.operation
        body = self.request.body(client.model)
        if client.is_cold and client.settings.repeating:
            body["drafts"] = "off"
        async with client.http.stream("POST", f"{client.url}/v1/completions", json=body, headers=headers) as response:
            yield response

    async def _receive_refusal(self, response: httpx.Response) -> None:
        message = _sentence(await response.aread())
        if response.status_code in BUSY_STATUSES:
            if self.has_headers:
                # A router that has only just started may not know its streams yet.
                raise BrokenStreamError(f"HTTP {response.status_code}: {message}")
            raise _BusyError(response.status_code, message)
        code = "not_resumable" if self.has_headers else f"http_{response.status_code}"
        self.answer.fail(code, message, response.status_code)


def _sentence(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


@dataclass(slots=True)
class ClientLoad:
    """Streams that ask their requests in turn: each request once (`run_once`), or from `start` until `stop`."""

    client: StreamingClient
    requests: Sequence[ChaosRequest]
    num_streams: int
    label: str
    """Operations' names begin with it: they are idempotency keys, and a server may remember those of an earlier run."""
    _stopped: bool = False
    _count: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def run_once(self) -> None:
        """Asks each request once, as many at a time as there are streams."""
        waiting = list(self.requests)

        async def work(stream: int) -> None:
            while waiting:
                await self._ask(stream, waiting.pop(0))

        await asyncio.gather(*(work(stream) for stream in range(self.num_streams)))

    def start(self) -> None:
        """Begins on all streams."""
        self.tasks = [asyncio.create_task(self._repeat(stream)) for stream in range(self.num_streams)]

    def stop(self) -> None:
        """Asks nothing more; what is asked goes on."""
        self._stopped = True

    async def join(self, timeout_s: float) -> None:
        """Waits until all streams have ended. What is late is cut off and has no end in the record."""
        if self.tasks:
            _, late = await asyncio.wait(self.tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome

    async def _repeat(self, stream: int) -> None:
        # Every stream begins with another request, so that all are under way at any time.
        turn = stream
        while not self._stopped:
            await self._ask(stream, self.requests[turn % len(self.requests)])
            # A server that refuses everything must not be asked without pause.
            await asyncio.sleep(0.01)
            turn += 1

    async def _ask(self, stream: int, request: ChaosRequest) -> None:
        self._count += 1
        await self.client.ask(f"{self.label}-{self._count}", stream, request)


def http_client(num_streams: int, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
    """Makes a client with connections for all streams; one that brings not even a comment for SILENCE_S is broken."""
    timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_TIMEOUT_S, pool=SILENCE_S)
    limits = httpx.Limits(max_connections=num_streams + 8, max_keepalive_connections=num_streams)
    return httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, transport=transport)
