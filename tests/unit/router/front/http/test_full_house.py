"""A server whose connections are all taken, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from starlette.types import Receive, Scope, Send

from services.router.front.http.answers import ConnectionLimits
from services.router.front.http.server import FrontServer
from tests.support.front.front_connection import front_config

HALF_A_BODY = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nabc"
GET = b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body", False):
        continue
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def full_server(max_connections: int) -> AsyncIterator[int]:
    """The port of one that has no place left, not even for refusals that wait for a request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        config = front_config(read_all, ConnectionLimits(max_connections=max_connections, refusal_s=30))
        server = FrontServer(config, lambda: None)
        port: int = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        holders = []
        for _ in range(max_connections + 1 + max_connections // 8):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HALF_A_BODY)
            holders.append(writer)
        for _ in range(1000):
            if len(server.server_state.connections) < len(holders):
                await asyncio.sleep(0.01)
        assert len(server.server_state.connections) == len(holders)
        try:
            yield port
        finally:
            for writer in holders:
                writer.transport.abort()
            server.should_exit = True
            await serving


def test_every_newcomer_is_told_so_and_none_is_reset() -> None:
    async def ask(port: int, number: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.002 * (number % 2))
        writer.write(GET * (1 if number % 3 else 200))
        with contextlib.closing(writer):
            return await reader.readline()

    async def main() -> None:
        async with full_server(16) as port:
            lines = [await ask(port, number) for number in range(30)]
        assert lines == [b"HTTP/1.1 503 Service Unavailable\r\n"] * len(lines)

    asyncio.run(asyncio.wait_for(main(), 60))
