"""Clients of the public API: streams that are read to their end, over breaks where the server keeps them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from chaos.record.answer import Answer
from chaos.record.history import Abandoned, Asked, Broken, Event, Reattached, Refused
from chaos.record.requests import ChaosRequest
from chaos.record.sse import EventParser, split_lines_async

REQUEST_ID_HEADER = "Moemesh-Request-Id"
RETRY_PAUSE_S = 0.1
CONNECT_TIMEOUT_S = 5.0
BUSY_STATUSES = (429, 503)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How patient the clients are."""

    resumable: bool
    reattach_within_s: float
    """After a break, for the stream to go on; and for a busy or absent server to take a request."""
    request_deadline_s: float


class BrokenStreamError(Exception):
    """The connection ended without an end of the answer."""


@dataclass(slots=True)
class StreamingClient:
    """Asks for one completion after another. `record` gets everything that it sees."""

    http: httpx.AsyncClient
    url: str
    model: str
    settings: ClientSettings
    record: Callable[[Event], None]
    clock: Callable[[], float]

    async def ask(self, operation: str, stream: int, request: ChaosRequest) -> None:
        """One operation from asking to its end, whatever the end is. Never raises what the server may cause."""
        self.record(
            Asked(
                self.clock(),
                operation,
                stream,
                request.name,
                request.body_sha256(self.model),
                request.kind,
                request.num_choices,
                request.max_tokens,
            )
        )
        answer = Answer(operation, request.num_choices, self.record, self.clock)
        asked_s = self.clock()
        try:
            async with asyncio.timeout(self.settings.request_deadline_s):
                await self._read_to_the_end(answer, request)
        except TimeoutError:
            self.record(Abandoned(self.clock(), operation, self.clock() - asked_s))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            answer.fail("unreadable", f"the server sent what cannot be read: {error}")

    async def _read_to_the_end(self, answer: Answer, request: ChaosRequest) -> None:
        connection = _Connection(self, answer, request)
        broke_s: float | None = None
        while not answer.is_over:
            try:
                await connection.read()
            except (httpx.TransportError, BrokenStreamError) as error:
                reason = f"{type(error).__name__}: {error}"
                self.record(Broken(self.clock(), answer.operation, reason))
                broke_s = self.clock() if broke_s is None or connection.has_progressed else broke_s
                if connection.has_headers and not connection.request_id:
                    answer.fail("connection_lost", f"{reason}; the server keeps no streams")
                    return
            except _BusyError as busy:
                self.record(Refused(self.clock(), answer.operation, busy.status, busy.message))
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
class _Connection:
    """The connections of one answer, one after another."""

    client: StreamingClient
    answer: Answer
    request: ChaosRequest
    request_id: str = ""
    has_headers: bool = False
    """An answer had begun: asking anew would begin another one."""
    has_progressed: bool = False

    async def read(self) -> None:
        """Until the answer is over. Raises httpx.TransportError, BrokenStreamError, _BusyError."""
        async with self._open() as response:
            if response.is_error:
                await self._take_refusal(response)
                return
            if self.has_headers:
                self.client.record(Reattached(self.client.clock(), self.answer.operation, self.answer.last_event_id))
            self.has_headers = True
            self.request_id = response.headers.get(REQUEST_ID_HEADER, self.request_id)
            parser = EventParser(self.answer.last_event_id)
            async for line in split_lines_async(response.aiter_bytes()):
                event = parser.take(line)
                if event is not None:
                    self.has_progressed = True
                    self.answer.take(event)
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
        body = self.request.body(client.model)
        async with client.http.stream("POST", f"{client.url}/v1/completions", json=body, headers=headers) as response:
            yield response

    async def _take_refusal(self, response: httpx.Response) -> None:
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
class Load:
    """Streams that ask their requests in turn. `run_once`: each request one time; `run`: until `stop`."""

    client: StreamingClient
    requests: Sequence[ChaosRequest]
    num_streams: int
    label: str
    """In front of operations' names: they are idempotency keys, and a server may remember those of an earlier run."""
    _stopped: bool = False
    _count: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def run_once(self) -> None:
        """All requests, as many at a time as there are streams."""
        waiting = list(self.requests)

        async def work(stream: int) -> None:
            while waiting:
                await self._ask(stream, waiting.pop(0))

        await asyncio.gather(*(work(stream) for stream in range(self.num_streams)))

    def start(self) -> None:
        """Begin on all streams."""
        self.tasks = [asyncio.create_task(self._repeat(stream)) for stream in range(self.num_streams)]

    def stop(self) -> None:
        """Ask nothing more; what is asked goes on."""
        self._stopped = True

    async def join(self, timeout_s: float) -> None:
        """Until all streams have ended. What is still under way then is cut off, and has no end in the record."""
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


def http_client(
    num_streams: int, silence_s: float, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """Connections for so many streams; one that says nothing for `silence_s`, not even a comment, is broken."""
    timeout = httpx.Timeout(silence_s, connect=CONNECT_TIMEOUT_S, pool=silence_s)
    limits = httpx.Limits(max_connections=num_streams + 8, max_keepalive_connections=num_streams)
    return httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, transport=transport)
