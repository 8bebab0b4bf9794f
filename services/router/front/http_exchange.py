"""ASGI's side of a request: its body with a bound, its client's going away, its answer's status for the metrics."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import RequestTooLargeError
from services.router.front.metrics import FrontMetrics

Result = TypeVar("Result")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
REQUEST_ID_SCOPE = "moemesh.request_id"
"""Where the id of a request stands in its scope."""
_CLIENT_CLOSED_STATUS = 499
"""nginx's number for a client that did not wait for the answer; it is only counted, never sent."""


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads an answer."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises RequestTooLargeError as soon as it is known to be too long."""
    too_large = RequestTooLargeError(f"the body may have {max_bytes} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client is gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def run_while_connected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """What `work` returns; cancels it when the client goes away, and then raises ClientGoneError."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStreamResponse(Response):
    """Server-sent events from an iterator, which is closed at once when the client goes away."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], Awaitable[None]], headers: Mapping[str, str]
    ) -> None:
        """`close` is awaited in any case, also when the answer was never begun."""
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_while_connected(self._send_events(send), receive)
        finally:
            await self._close()

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events):
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ExchangeMiddleware:
    """Gives every request an id and counts every answer."""

    def __init__(self, app: ASGIApp, metrics: FrontMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope[REQUEST_ID_SCOPE] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._metrics.requests_in_flight.inc()
        try:
            with structlog.contextvars.bound_contextvars(http_request_id=request_id):
                await self._app(scope, receive, send_with_id)
        except ClientGoneError:
            status = _CLIENT_CLOSED_STATUS
            self._metrics.cancelled.inc()
        finally:
            self._metrics.requests_in_flight.dec()
            # The route's pattern, not the path: paths are the client's, and each label value costs memory for ever.
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(route, str(status)).inc()


def _request_id(scope: Scope) -> str:
    """The client's own, if it is a plain one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(text):
                return text
    return f"req-{uuid.uuid4().hex}"
