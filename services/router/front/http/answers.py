"""JSON answers and errors in OpenAI's shapes, and what a connection answers by itself, with the limits that it has.

A connection itself refuses what is not a request, what comes too late and one connection too many, and answers HTTP/1.0
without chunks.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import os
from dataclasses import dataclass

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from common.errors import InvalidRequestError, MoemeshError, OverloadedError
from services.router.front.replies import encode_json, error_body

log = structlog.get_logger(__name__)

MAX_REFUSED_BYTES = 64 * 1024
_TOO_MANY = "this server has as many connections as it allows; try again"
REFUSAL_S = 1.0


def error_answer(error: Exception) -> Response:
    """Returns an answer with the status of the error; what is not a MoemeshError is a defect, and logged as one."""
    log_error(error)
    status = error.http_status if isinstance(error, MoemeshError) else 500
    headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, OverloadedError) else None
    return JSONResponse(error_body(error), status, headers)


def log_error(error: Exception) -> None:
    """Logs what is not the client's fault."""
    if not isinstance(error, MoemeshError):
        log.error("request_failed_by_defect", exc_info=error)
    elif error.http_status >= 500:
        log.warning("request_failed", code=error.code, reason=error.message)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Answers unknown paths and methods in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    error_text = f"{request.method} {request.url.path}: {error.detail}"
    body = error_body(InvalidRequestError(error_text))
    body["error"]["code"] = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    headers = dict(error.headers or {})
    if error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:
        # One path may have several routes, and the one that raised this knows its own methods only.
        routes = [route for route in request.app.routes if isinstance(route, Route)]
        fitting = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        headers["Allow"] = ", ".join(sorted({method for route in fitting for method in route.methods or ()}))
    return JSONResponse(body, error.status_code, headers)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection may take, and how many of them there may be."""

    keep_alive_s: float = 75.0
    """It runs between two requests. It is longer than the minute that proxies and clients commonly keep theirs: the end
    that closes last loses no request to a connection that the other end has just closed."""
    head_s: float = 10.0
    """It runs from the connection, or from the first byte of a later request, to the end of the request's head."""
    body_silence_s: float = 30.0
    """It runs between two pieces of a body."""
    body_s: float = 120.0
    """It runs for a whole body."""
    write_silence_s: float = 30.0
    """In this time a client reads `min_read_bytes` of what waits for it, or all of it."""
    min_read_bytes: int = 16 * 1024
    max_head_bytes: int = 64 * 1024
    """Request line and headers count, and so does what stands between two pieces of a body, and behind the last."""
    max_connections: int = 1024
    """One more takes the place of the one that has been without a request for longest; where all have one it is
    answered 503."""
    min_idle_s: float = 0.5
    """A connection keeps its place for this long: what a client has just asked may not be read yet."""
    refusal_s: float = REFUSAL_S
    """It runs for the head of a request that is to be refused."""


def without_chunks(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """Answers clients of HTTP/1.0: an answer without a length ends where the connection does (RFC 9112, 6.3)."""
    cycle.chunked_encoding = False

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_plainly(message: Message) -> None:
            # uvicorn counts what is left of a length; here each piece is all that is left.
            cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plainly)

    return answer


def closing_if_unread(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """Serves a client that sends its body only once it is asked for it: if it is answered before, it is not known
    whether that body still comes, and what it sends next could be taken for it (RFC 9110, 10.1.1)."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and cycle.waiting_for_100_continue and cycle.more_body:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await app(scope, receive, send_and_close)

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
    answer = error_answer(OverloadedError(_TOO_MANY, retry_after_s=1))
    answer.status_code = http.HTTPStatus.SERVICE_UNAVAILABLE
    answer.headers["connection"] = "close"
    await answer(scope, receive, send)


def refusal(status: http.HTTPStatus, limits: ConnectionLimits) -> bytes:
    """Returns the answer to what is not a request or exceeds a limit; the connection is closed after it."""
    sentences = {
        http.HTTPStatus.REQUEST_TIMEOUT: f"a request's head must come within {limits.head_s:g} s, and its body without "
        f"a pause of more than {limits.body_silence_s:g} s and within {limits.body_s:g} s",
        http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"a request's head may have at most {limits.max_head_bytes} "
        "bytes",
    }
    sentence = sentences.get(status, "this is not an HTTP/1.1 request")
    return whole_answer(status, InvalidRequestError(sentence))


def refuse_unread(transport: asyncio.Transport) -> None:
    """Does as `refuse_connection`, without waiting for the request. What has come of it is read and dropped: closing
    over unread bytes resets the connection, and may take the answer with it."""
    if (connection := transport.get_extra_info("socket")) is not None:
        with contextlib.suppress(OSError):
            os.read(connection.fileno(), MAX_REFUSED_BYTES)
    error = OverloadedError(_TOO_MANY, retry_after_s=1)
    transport.write(whole_answer(http.HTTPStatus.SERVICE_UNAVAILABLE, error, "retry-after: 1\r\n"))
    transport.close()


def whole_answer(status: http.HTTPStatus, error: Exception, headers: str = "") -> bytes:
    """Returns the bytes of an answer after which the connection is closed; `headers` are lines of its head."""
    body = encode_json(error_body(error))
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
