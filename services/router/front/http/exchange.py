"""ASGI's side of a request: its body with a bound, its client's going away, which pages may read its answer, and that
answer's status for the metrics."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import ForbiddenError, OverloadedError, RequestTooLargeError, UnsupportedEncodingError
from services.router.front.http.answers import error_answer
from services.router.front.http.cross_origin import OriginPolicy
from services.router.front.metrics import FrontMetrics

Result = TypeVar("Result")
_COMPRESSIONS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
REQUEST_ID_SCOPE = "moemesh.request_id"
"""Where the id of a request stands in its scope."""
_CLIENT_CLOSED_STATUS = 499
"""nginx's number for a client that did not wait for the answer; it is only counted, never sent."""
_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
_EXPOSED = "x-request-id, moemesh-request-id, retry-after"
_ASKED_METHOD = "access-control-request-method"
_PREFLIGHT_SECONDS = "600"


@dataclass(slots=True)
class BodyBudget:
    """Counts the bytes of all bodies that are in memory and not yet requests. It belongs to the event loop."""

    max_bytes: int
    held_bytes: int = 0


class HeldBody:
    """One body's part of the budget. The first bytes of each are free, so that large ones keep no small one out."""

    FREE_BYTES = 16 * 1024

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._held_bytes = 0

    def grow_to(self, num_bytes: int) -> None:
        """Counts this many bytes for the body from now on. Raises OverloadedError if that exceeds the budget."""
        more_bytes = max(0, num_bytes - self.FREE_BYTES) - self._held_bytes
        if self._budget.held_bytes + more_bytes > self._budget.max_bytes:
            raise OverloadedError(
                f"the bodies of the requests that are being read may have {self._budget.max_bytes} bytes together, "
                "which this one would exceed; try again",
                retry_after_s=1,
            )
        self._budget.held_bytes += more_bytes
        self._held_bytes += more_bytes

    def release(self) -> None:
        """Gives its bytes back, which are gone or belong to a request now; it may be called again."""
        self._budget.held_bytes -= self._held_bytes
        self._held_bytes = 0


async def read_body(request: Request, max_bytes: int, held: HeldBody) -> bytes:
    """Returns the whole body. Raises RequestTooLargeError as soon as it is known to be too long,
    UnsupportedEncodingError, and OverloadedError."""
    _check_codings(request)
    too_large = RequestTooLargeError(f"the body may have at most {max_bytes} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
        held.grow_to(len(body))
    return bytes(body)


def _check_codings(request: Request) -> None:
    """Raises UnsupportedEncodingError for a compressed body, which would otherwise be refused as not being JSON."""
    for header in ("content-encoding", "transfer-encoding"):
        for coding in request.headers.get(header, "").lower().split(","):
            if coding.strip() in _COMPRESSIONS:
                raise UnsupportedEncodingError(
                    f"{header.title()}: this server reads no bodies in `{coding.strip()}`; send it uncompressed"
                )


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client is gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def run_while_connected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Returns what `work` returns. Cancels it when the client goes away, and then raises ClientDisconnect."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStreamResponse(StreamingResponse):
    """Server-sent events from an iterator, which is closed at once when the client goes away."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], Awaitable[None]], headers: Mapping[str, str]
    ) -> None:
        """`close` is awaited in any case, also when the answer was never begun."""
        super().__init__(events, headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await run_while_connected(self.stream_response(send), receive)
        finally:
            await self._close()


class ExchangeMiddleware:
    """Gives every request an id, counts every answer, and takes surplus slashes out of paths. It answers preflights and
    pages that may not ask itself, and lets the answers to allowed pages be read by them."""

    def __init__(self, app: ASGIApp, metrics: FrontMetrics, policy: OriginPolicy) -> None:
        self._app = app
        self._metrics = metrics
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Clients that join a base address and a path by hand put one too many in between or behind.
        scope["path"] = re.sub("/+", "/", scope["path"]).removesuffix("/") or "/"
        headers = Headers(scope=scope)
        request_id = scope[REQUEST_ID_SCOPE] = _request_id(headers)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                self._let_read(headers.get("origin"), answer)
            await send(message)

        self._metrics.requests_in_flight.inc()
        try:
            with structlog.contextvars.bound_contextvars(http_request_id=request_id):
                await self._app_for(scope["method"], headers)(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = _CLIENT_CLOSED_STATUS
            self._metrics.cancelled.inc()
        finally:
            self._metrics.requests_in_flight.dec()
            # The route's pattern, not the path: paths are the client's, and each label value costs memory for ever.
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(route, str(status)).inc()

    def _app_for(self, method: str, headers: Headers) -> ASGIApp:
        """Returns what answers the request."""
        try:
            self._policy.check(headers)
        except ForbiddenError as error:
            return error_answer(error)
        is_preflight = method == "OPTIONS" and "origin" in headers and _ASKED_METHOD in headers
        return _preflight_answer(headers) if is_preflight else self._app

    def _let_read(self, origin: str | None, answer: MutableHeaders) -> None:
        answer.add_vary_header("Origin")  # also where there is none: a cache may ask in the name of others
        if origin is not None and self._policy.allows(origin):
            answer["access-control-allow-origin"] = "*" if "*" in self._policy.origins else origin
            answer["access-control-expose-headers"] = _EXPOSED


def _preflight_answer(headers: Headers) -> Response:
    allowed = {
        "access-control-allow-methods": _METHODS,
        "access-control-max-age": _PREFLIGHT_SECONDS,
        "vary": "Access-Control-Request-Headers",
    }
    if asked := headers.get("access-control-request-headers"):
        # SDKs send a dozen of their own; none of them lets a page do more than the methods do.
        allowed["access-control-allow-headers"] = asked
    if headers.get("access-control-request-private-network") == "true":
        allowed["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=allowed)


def _request_id(headers: Headers) -> str:
    """Returns the client's own id, if it is a plain one, else a new one."""
    for text in headers.getlist("x-request-id"):
        if _REQUEST_ID.fullmatch(text):
            return text
    return f"req-{uuid.uuid4().hex}"
