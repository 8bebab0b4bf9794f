"""What a connection may take and send, and what it answers by itself: refusals, and HTTP/1.0 without chunks."""

from __future__ import annotations

import asyncio
import contextlib
import http
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from common.errors import InvalidRequestError, OverloadedError
from services.router.front.http_answers import error_answer
from services.router.front.replies import encode_json, error_body

MAX_REFUSED_BYTES = 64 * 1024
REFUSAL_S = 1.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Of one connection, but for the last."""

    keep_alive_s: float = 75.0
    """Between two requests. Longer than the minute that proxies and clients commonly keep theirs: who closes last
    loses no request to a connection that the other end has just closed."""
    head_s: float = 10.0
    """From the connection, or from the first byte of a later request, to the end of the request's head."""
    body_silence_s: float = 30.0
    """Between two pieces of a body."""
    body_s: float = 120.0
    """For a whole body."""
    write_silence_s: float = 30.0
    """In so much time a client takes `min_taken_bytes` of what waits for it, or all of it."""
    min_taken_bytes: int = 16 * 1024
    max_head_bytes: int = 64 * 1024
    """Request line and headers; also what stands between two pieces of a body, and behind the last."""
    max_connections: int = 1024
    """At a time. One more takes the place of the one that has been without a request for longest; where all have one
    it is answered 503."""
    min_idle_s: float = 0.5
    """Before it loses its place: what a client has just asked may not be read yet."""
    refusal_s: float = REFUSAL_S
    """For the head of a request that is to be refused."""


def without_chunks(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """For clients of HTTP/1.0: an answer without a length ends where the connection does (RFC 9112, 6.3)."""
    cycle.chunked_encoding = False

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_plainly(message: Message) -> None:
            # uvicorn counts what is left of a length; here each piece is all that is left.
            cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plainly)

    return answer


async def _read_short_body(receive: Receive) -> None:
    num_bytes, more = 0, True
    while more and num_bytes <= MAX_REFUSED_BYTES:
        message = await receive()
        num_bytes, more = num_bytes + len(message.get("body", b"")), message.get("more_body", False)


async def refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    """Says so once the request is read, if that is short and quick: to close before would take the answer with it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REFUSAL_S):
            await _read_short_body(receive)
    error = OverloadedError("this server has as many connections as it takes; try again", retry_after_s=1)
    answer = error_answer(error)
    answer.status_code = http.HTTPStatus.SERVICE_UNAVAILABLE
    answer.headers["connection"] = "close"
    await answer(scope, receive, send)


def refusal(status: http.HTTPStatus, limits: ConnectionLimits) -> bytes:
    sentences = {
        http.HTTPStatus.REQUEST_TIMEOUT: f"a request's head must come within {limits.head_s:g} s, and its body without "
        f"a pause of more than {limits.body_silence_s:g} s and within {limits.body_s:g} s",
        http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"a request's head may have {limits.max_head_bytes} bytes",
    }
    sentence = sentences.get(status, "this is not an HTTP/1.1 request")
    body = encode_json(error_body(InvalidRequestError(sentence)))
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
