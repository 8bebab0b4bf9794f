"""The server's end of one HTTP connection, without a socket, and with a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from services.router.front.http.answers import ConnectionLimits, refuse_connection
from services.router.front.http.server import FrontConfig, FrontProtocol
from services.router.front.metrics import ConnectionMetrics

HEAD = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n"
GET = b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"


class Timers:
    """In place of the event loop: its timers go off when the test says that time has passed."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, Callable[..., None], tuple[Any, ...], Timers.Handle]] = []

    class Handle:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    def call_later(self, delay_s: float, act: Callable[..., None], *arguments: Any) -> Timers.Handle:
        handle = Timers.Handle()
        self._due.append((self.now_s + delay_s, act, arguments, handle))
        return handle

    def time(self) -> float:
        return self.now_s

    def create_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)

    def pass_time(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while due := [timer for timer in self._due if timer[0] <= end_s and not timer[3].cancelled]:
            first = min(due, key=lambda timer: timer[0])
            self._due.remove(first)
            self.now_s = first[0]
            first[1](*first[2])
        self.now_s = end_s


def front_config(
    app: ASGIApp, limits: ConnectionLimits | None = None, metrics: ConnectionMetrics | None = None
) -> FrontConfig:
    """The server's configuration, with metrics that nobody reads if none are given."""
    metrics = metrics or ConnectionMetrics(CollectorRegistry())
    return FrontConfig(app, limits or ConnectionLimits(), metrics, refuse_connection)


class Connection(asyncio.Transport):
    """The server's end, without a socket."""

    def __init__(
        self,
        limits: ConnectionLimits = ConnectionLimits(),  # noqa: B008  # it cannot be changed
        among: ServerState | None = None,
        timers: Timers | None = None,
        metrics: ConnectionMetrics | None = None,
    ) -> None:
        super().__init__()
        self.timers = Timers() if timers is None else timers
        self.answered = b""
        self.body = b""
        self.unread_bytes = 0
        """What waits for a client that reads slowly."""
        self.is_closed = False
        self.is_cut = False
        self.may_answer = asyncio.Event()
        config = front_config(self.app, limits, metrics)
        loop: Any = self.timers
        self.protocol = FrontProtocol(config, among or ServerState(), {}, _loop=loop)
        self.protocol.connection_made(self)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the body, begins its answer, and ends it when the test lets it."""
        more = True
        while more:
            message = await receive()
            self.body += message.get("body", b"")
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await self.may_answer.wait()
        await send({"type": "http.response.body", "body": b"last", "more_body": False})

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            if not self.is_closed:
                self.protocol.data_received(piece)
            await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def status(self) -> int:
        return int(self.answered.split()[1])

    def write(self, data: Any) -> None:
        self.answered += data

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.is_cut = True
        self.close()

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes

    def is_closing(self) -> bool:
        return self.is_closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def run(
    work: Callable[[Connection], Coroutine[Any, Any, None]],
    limits: ConnectionLimits = ConnectionLimits(),  # noqa: B008  # it cannot be changed
) -> None:
    async def main() -> None:
        connection = Connection(limits)
        await work(connection)
        connection.may_answer.set()
        connection.close()
        await connection.settle()

    asyncio.run(asyncio.wait_for(main(), 20))
