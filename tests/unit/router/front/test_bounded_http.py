"""Connections over real sockets: every wait for a client ends, and what is too large is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from services.router.front import bounded_http
from services.router.front.bounded_http import MAX_HEAD_BYTES, BoundedHttp

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Says how long the body was, byte by byte and slowly where the path asks for that."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for character in str(size):
        if scope["path"] == "/slow":
            await asyncio.sleep(0.3)
        await send({"type": "http.response.body", "body": character.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def connected() -> AsyncIterator[Callable[[], Coroutine[Any, Any, Streams]]]:
    config = uvicorn.Config(app, http=BoundedHttp, port=0, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield lambda: asyncio.open_connection(host, port)
    finally:
        server.should_exit = True
        await serving


def run(work: Callable[[Callable[[], Coroutine[Any, Any, Streams]]], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with connected() as connect:
            await work(connect)

    asyncio.run(asyncio.wait_for(main(), 20))


async def answer_to(streams: Streams, *pieces: bytes, pause_s: float = 0.0) -> tuple[int, Any]:
    """Status and JSON of what comes before the connection is closed; (0, None) for nothing."""
    reader, writer = streams
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause_s)
    data = await reader.read()
    writer.close()
    if not data:
        return 0, None
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body.startswith(b"{") else body


@pytest.fixture
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_S", 0.2)
    monkeypatch.setattr(bounded_http, "BODY_SILENCE_S", 0.2)


@pytest.mark.usefixtures("_short_waits")
@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nhost: a\r\n", b"GET / HTTP/1.1\r\nhos"])
def test_a_head_that_does_not_come_ends_the_connection(sent: bytes) -> None:
    async def work(connect: Any) -> None:
        status, told = await answer_to(await connect(), sent)
        assert status == 408
        assert "head did not come" in told["error"]["message"]

    run(work)


@pytest.mark.usefixtures("_short_waits")
def test_a_body_that_stops_ends_the_connection_and_a_slow_one_does_not() -> None:
    head = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 5\r\n\r\n"

    async def work(connect: Any) -> None:
        status, told = await answer_to(await connect(), head, b"ab")
        assert (status, told["error"]["code"]) == (408, "request_timeout")
        status, _ = await answer_to(await connect(), head, *(b"abcde"[i : i + 1] for i in range(5)), pause_s=0.12)
        assert status == 200

    run(work)


@pytest.mark.usefixtures("_short_waits")
def test_an_answer_may_take_its_time_and_a_further_request_has_its_own() -> None:
    async def work(connect: Any) -> None:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(b"POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: 12\r\n\r\n" + b"x" * 12)
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += await reader.read(1000)
            assert data.startswith(b"HTTP/1.1 200")
        writer.close()

    run(work)


@pytest.mark.usefixtures("_short_waits")
@pytest.mark.parametrize(
    "behind", [b"GET / HT", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc"], ids=["head", "body"]
)
def test_an_answer_is_not_cut_for_half_a_request_behind_it(behind: bytes) -> None:
    async def work(connect: Any) -> None:
        reader, writer = await connect()
        size = 1234567
        writer.write(
            f"POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: {size}\r\n\r\n".encode() + b"x" * size + behind
        )
        data = await reader.read()
        writer.close()
        first, _, second = data.partition(b"0\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 200")
        assert first.count(b"\r\n1\r\n") == len(str(size)), "chunks of one digit each"
        assert second.startswith(b"HTTP/1.1 408"), "its own end comes afterwards"

    run(work)


@pytest.mark.parametrize(
    "pieces",
    [
        (b"GET / HTTP/1.1\r\nx: " + b"a" * (MAX_HEAD_BYTES + 1) + b"\r\n\r\n",),
        (b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nhost: a\r\n\r\n",),
        (b"GET / HTTP/1.1\r\n", *[b"x: " + b"a" * 4096 + b"\r\n"] * 17),
        (b"GET / HTTP/1.1\r\nx: ", *[b"a" * 16384] * 5),
    ],
    ids=["one header", "the path", "many headers", "no end"],
)
def test_a_head_that_is_too_large_is_refused(pieces: tuple[bytes, ...]) -> None:
    async def work(connect: Any) -> None:
        status, told = await answer_to(await connect(), *pieces, pause_s=0.01)
        assert status == 431
        assert str(MAX_HEAD_BYTES) in told["error"]["message"]

    run(work)


def test_a_large_body_is_no_large_head() -> None:
    size = 3 * MAX_HEAD_BYTES

    async def work(connect: Any) -> None:
        head = f"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {size}\r\n\r\n".encode()
        status, _ = await answer_to(await connect(), head + b"x" * size)
        assert status == 200

    run(work)


def test_what_is_no_http_is_refused_with_a_sentence() -> None:
    async def work(connect: Any) -> None:
        status, told = await answer_to(await connect(), b"\x16\x03\x01 hello\r\n\r\n")
        assert (status, told["error"]["message"]) == (400, "Invalid HTTP request received.")

    run(work)
