"""The HTTP server of the front: uvicorn's, with limits on what connections send and take, and on how many there are.

uvicorn bounds the pause between two requests and nothing else: half a request, or an unread answer, would stay open for
ever, and a head may take all memory. It also loses the body of a request that offers an upgrade, and sends chunks to
clients of HTTP/1.0, which do not know them.
"""

from __future__ import annotations

import asyncio
import http
import re
import socket
from collections.abc import Callable, Sequence
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from common.errors import InvalidRequestError
from services.router.front.http.answers import (
    ConnectionLimits,
    closing_if_unread,
    refusal,
    refuse_unread,
    whole_answer,
    without_chunks,
)
from services.router.front.metrics import ConnectionMetrics

Headers = Sequence[tuple[bytes, bytes]]
"""Names are in lower case."""
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\],]*)(:[0-9]*)?")
PATIENCE_S = 4.0
"""How long replies that are under way may take when the server is to end."""
LOOK_S = 0.1
ACCEPTED_AT_ONCE = 2
"""New connections in one turn of the loop. asyncio accepts this many, in each of the three or four turns that it needs
for one, before the first of them can make room for itself: the whole queue at once would use up all descriptors there
are."""
QUEUED = 1024
"""Connections that wait in the kernel meanwhile."""
CUT_S = 5.0
"""How long after the end of the router begins uvicorn cuts connections; by then each has been told."""


class FrontConfig(uvicorn.Config):
    """uvicorn's configuration, with the limits of connections."""

    def __init__(
        self, app: ASGIApp, limits: ConnectionLimits, metrics: ConnectionMetrics, refusing_app: ASGIApp
    ) -> None:
        """`refusing_app` answers in place of `app` where there is one connection too many."""
        super().__init__(
            app,
            http=FrontProtocol,
            ws="none",  # no route speaks it, and its connections would have other limits
            interface="asgi3",
            log_config=None,
            access_log=False,
            timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]
            timeout_graceful_shutdown=int(CUT_S),
            server_header=False,
            backlog=ACCEPTED_AT_ONCE,
        )
        self.limits = limits
        self.metrics = metrics
        self.refusing_app = refusing_app


class FrontProtocol(HttpToolsProtocol):
    """One connection. While an answer is under way, only its client's reading is timed."""

    def __init__(self, config: FrontConfig, *arguments: Any, **settings: Any) -> None:
        super().__init__(config, *arguments, **settings)
        self.limits = config.limits
        self._metrics = config.metrics
        self._refusing_app = config.refusing_app
        self._is_in_head = False
        self._awaits_body = False
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._left_bytes = 0
        """What waited for the client at the last look, if nothing was added since."""
        self._body_began_s = 0.0
        self._idle_since_s = 0.0
        self._is_one_too_many = False
        self._is_evicted = False
        self._is_replaying_head = False
        """The head that is being parsed came with an offer to upgrade; it is parsed again without."""
        self._head_bytes = 0
        """The request line and the headers that are complete."""
        self._unused_bytes = 0
        """What came since the parser last had something to tell."""
        self._refusal = refusal(http.HTTPStatus.BAD_REQUEST, self.limits)
        self._is_deaf = False
        """What came after the last request was not one: the answers that are owed still go out, and nothing is read."""

    # ---- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._metrics.open.inc()
        self._idle_since_s = self.loop.time()
        self._make_room()
        self._restart_timer(self.limits.refusal_s if self._is_one_too_many else self.limits.head_s)
        self._look = self.loop.call_later(self.limits.write_silence_s, self._look_at_reader)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._metrics.open.dec()
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._unused_bytes += len(data)
        if not self._is_deaf:
            self._parse(data)
        if self.transport.is_closing():
            self._stop_timer()
        elif self._unused_bytes > self.limits.max_head_bytes:
            self._refuse(refusal(http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, self.limits))
        elif self._is_deaf:
            self._stop_timer()
        elif self._awaits_body:
            self._await_body()
        elif self._timer is None and not self._is_answering() and self.timeout_keep_alive_task is None:
            # Empty lines before a request end the keep-alive, and begin nothing.
            self._restart_timer(self.limits.head_s)

    def send_400_response(self, msg: str) -> None:
        """Replaces uvicorn's: the parser has stopped."""
        if self._is_answering() and not self._awaits_body and self._unused_bytes <= self.limits.max_head_bytes:
            # Commonly the body of a request that did not announce it: its client is to hear of that.
            self._is_deaf, self.cycle.keep_alive = True, False
        else:
            self._refuse(self._refusal)

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        except httptools.HttpParserUpgrade as upgrade:
            # The parser takes what follows for another protocol, of which this server speaks none. RFC 9110, 7.8: it
            # may ignore the offer, and the request then means what it means without.
            method, version = self.parser.get_method(), self.parser.get_http_version()
            head, rest = head_without_upgrade(method, self.url, version, self.headers), data[upgrade.args[0] :]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            self._parse(head + rest)

    # ---- what the parser tells

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._head_bytes = self._unused_bytes = 0
        if self._timer is None:
            self._restart_timer(self.limits.head_s)

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise httptools.HttpParserError  # it asks for a tunnel, which has no request in it
            self._is_replaying_head = True
            return
        self._is_replaying_head = False
        try:
            self.headers[:] = with_one_host(self.parser.get_http_version(), self.url, self.headers)
        except InvalidRequestError as error:
            self._refusal = whole_answer(http.HTTPStatus.BAD_REQUEST, error)
            raise httptools.HttpParserError from error
        super().on_headers_complete()  # raises for a head that asks for nothing
        self._is_in_head, self._awaits_body = False, True
        self._unused_bytes = 0
        self._body_began_s = self.loop.time()
        self._await_body()

    def on_body(self, body: bytes) -> None:
        self._unused_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_replaying_head:
            return
        self._awaits_body = False
        self._unused_bytes = 0
        self._stop_timer()
        super().on_message_complete()

    # ---- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self._is_one_too_many:
            app = self._refusing_app
        if cycle.scope["http_version"] != "1.1":
            cycle.waiting_for_100_continue = False
            app = without_chunks(app, cycle)
        elif cycle.waiting_for_100_continue:
            app = closing_if_unread(app, cycle)
        self._left_bytes = 0
        super()._start_asgi_task(cycle, app)

    def resume_writing(self) -> None:
        self._left_bytes = 0
        super().resume_writing()

    def on_response_complete(self) -> None:
        self._idle_since_s = self.loop.time()
        super().on_response_complete()

    # ---- limits

    def _make_room(self) -> None:
        if len(self.connections) <= self.limits.max_connections:
            return
        others = [other for other in self.connections if isinstance(other, FrontProtocol) and not other._is_evicted]
        idle = [other for other in others if other._is_idle() and other is not self]
        if len(others) <= self.limits.max_connections:
            return
        if idle:
            self._metrics.ended.labels("displaced").inc()
            min(idle, key=_worth)._evict()
            return
        self._metrics.ended.labels("refused").inc()
        if len(others) <= self.limits.max_connections + 1 + self.limits.max_connections // 8:
            self._is_one_too_many = True
        else:  # not even for refusals is there any room
            self._is_evicted = self._is_deaf = True
            refuse_unread(self.transport)

    def _is_idle(self) -> bool:
        """Says whether nothing is asked of it, between two requests or before the end of the first head."""
        if self._awaits_body or self._is_answering() or self._is_one_too_many:
            return False
        return self.loop.time() - self._idle_since_s >= self.limits.min_idle_s

    def _evict(self) -> None:
        self._is_evicted = True
        self.transport.abort()

    def _look_at_reader(self) -> None:
        """Cuts an answer that its client does not read: it holds a connection and all that was computed for it."""
        left_bytes = self.transport.get_write_buffer_size()
        if self._left_bytes and left_bytes > max(0, self._left_bytes - self.limits.min_read_bytes):
            self._metrics.ended.labels("unread").inc()
            self.transport.abort()
            return
        # An answer that may go on can have grown by what was taken.
        is_final = self.flow.write_paused or self.transport.is_closing() or not self._is_answering()
        self._left_bytes = left_bytes if is_final else 0
        self._look = self.loop.call_later(self.limits.write_silence_s, self._look_at_reader)

    def _await_body(self) -> None:
        left_s = self._body_began_s + self.limits.body_s - self.loop.time()
        self._restart_timer(max(0.0, min(self.limits.body_silence_s, left_s)))

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self.limits.max_head_bytes:
            self._refusal = refusal(http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, self.limits)
            raise httptools.HttpParserError  # the parser ends with it, and `data_received` asks for the answer

    def _restart_timer(self, delay_s: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(delay_s, self._on_timeout, delay_s)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self, delay_s: float) -> None:
        self._timer = None
        if self._is_answering() or self.flow.read_paused:
            # Nothing can come while nothing reads, and what goes out is not cut.
            if self._awaits_body:
                self._body_began_s = self.loop.time()
                self._await_body()
            else:
                self._restart_timer(delay_s)
        elif self._is_in_head or self._awaits_body:
            self._refuse(refusal(http.HTTPStatus.REQUEST_TIMEOUT, self.limits), "late")
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        """Says whether an answer is under way, or will be once the mesh has one, to this request or an earlier one."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return cycle.response_started or not self._awaits_body or bool(self.pipeline)

    def _refuse(self, answer: bytes, why: str = "invalid") -> None:
        """Says why, if nothing else is or was said, and closes."""
        self._stop_timer()
        self._metrics.ended.labels(why).inc()
        has_answer = self._awaits_body and self.cycle is not None and self.cycle.response_complete
        if not self._is_answering() and not has_answer and not self.transport.is_closing():
            self.transport.write(answer)
        self.transport.close()


def _worth(connection: FrontProtocol) -> tuple[bool, float]:
    """Orders idle connections; the least goes first. One whose last answer is still on its way goes last."""
    return connection.transport.get_write_buffer_size() > 0, connection._idle_since_s


def with_one_host(version: str, target: bytes, headers: Headers) -> list[tuple[bytes, bytes]]:
    """Returns the headers with the Host that the target names, where that is a whole address (RFC 9112, 3.2).

    Raises InvalidRequestError unless there is one Host (HTTP/1.0: at most one) of the form of one. A proxy in between
    and the router must not differ about it: else it would be no use to check it.
    """
    hosts = [value for name, value in headers if name == b"host"]
    is_missing = not hosts and version != "1.0"
    if is_missing or len(hosts) > 1 or not all(_HOST.fullmatch(host) for host in hosts):
        raise InvalidRequestError("a request has one `Host` header: a name or an address, and perhaps a port")
    url = httptools.parse_url(target)
    if url.host is None:
        return list(headers)
    host = b"[%s]" % url.host if b":" in url.host else url.host
    port = b"" if url.port is None else b":%d" % url.port
    return [*(header for header in headers if header[0] != b"host"), (b"host", host + port)]


def head_without_upgrade(method: bytes, target: bytes, version: str, headers: Headers) -> bytes:
    """Returns the same request without its offer to speak another protocol."""
    lines = [b"%s %s HTTP/%s" % (method, target, version.encode())]
    for name, value in headers:
        if name == b"connection":
            value = b", ".join(token for token in value.split(b",") if token.strip().lower() != b"upgrade")
        if name != b"upgrade":
            lines.append(name + b": " + value)
    return b"\r\n".join(lines) + b"\r\n\r\n"


class FrontServer(uvicorn.Server):
    """Tells clients when it begins to end: those that can come back are sent away at once, others get their time."""

    def __init__(
        self,
        config: FrontConfig,
        on_shutdown: Callable[[], None],
        give_up: Callable[[], None] = lambda: None,
        may_finish: Callable[[], bool] = lambda: True,
    ) -> None:
        """`give_up` is to end what is still under way after PATIENCE_S, or once `may_finish` says that nothing more
        comes."""
        super().__init__(config)
        self._on_shutdown = on_shutdown
        self._give_up = give_up
        self._may_finish = may_finish

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn. It sets the length of the queue, which asyncio makes as short as what it accepts at once."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUED)  # asyncio has one number for this and for how many it takes at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn. It tells that the end begins, and ends what is left after PATIENCE_S."""
        self._on_shutdown()
        ending = asyncio.create_task(self._end_rest())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_rest(self) -> None:
        for _ in range(int(PATIENCE_S / LOOK_S)):
            if not self._may_finish():
                break
            await asyncio.sleep(LOOK_S)
        self._give_up()
