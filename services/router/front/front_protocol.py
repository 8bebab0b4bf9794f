"""uvicorn's HTTP/1.1 connection with limits on what comes in: how long it may take and how large a head may be.

uvicorn bounds the pause between two requests and nothing else: half a request would stay open for ever, and a head may
take all memory.
"""

from __future__ import annotations

import asyncio
import http
from dataclasses import dataclass
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.errors import InvalidRequestError
from services.router.front.replies import encode_json, error_body


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Of one connection. The pause between two requests is uvicorn's `timeout_keep_alive`."""

    head_s: float = 10.0
    """From the connection, or from the first byte of a later request, to the end of the request's head."""
    body_silence_s: float = 30.0
    """Between two pieces of a body."""
    max_head_bytes: int = 64 * 1024
    """Request line and headers; also what stands between two pieces of a body, and behind the last."""


class FrontProtocol(HttpToolsProtocol):
    """One connection. While an answer is under way, nothing is timed."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._is_in_head = False
        self._awaits_body = False
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        """Of the request line and the headers that are complete."""
        self._unused_bytes = 0
        """Since the parser last had something to tell."""
        self._refusal = http.HTTPStatus.BAD_REQUEST

    # ---- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._restart_timer(self.limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unused_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            self._stop_timer()
        elif self._unused_bytes > self.limits.max_head_bytes:
            self._refuse(http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self._awaits_body:
            self._restart_timer(self.limits.body_silence_s)
        elif self._timer is None and not self._is_answering() and self.timeout_keep_alive_task is None:
            # Empty lines before a request end the keep-alive, and begin nothing.
            self._restart_timer(self.limits.head_s)

    def send_400_response(self, msg: str) -> None:
        """In place of uvicorn's: the parser has stopped."""
        self._refuse(self._refusal)

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
        super().on_headers_complete()  # raises for a head that asks for nothing
        self._is_in_head, self._awaits_body = False, True
        self._unused_bytes = 0
        self._restart_timer(self.limits.body_silence_s)

    def on_body(self, body: bytes) -> None:
        self._unused_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._awaits_body = False
        self._unused_bytes = 0
        self._stop_timer()
        super().on_message_complete()

    # ---- limits

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self.limits.max_head_bytes:
            self._refusal = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
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
            self._restart_timer(delay_s)  # nothing can come while nobody reads, and what goes out is not cut
        elif self._is_in_head or self._awaits_body:
            self._refuse(http.HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        """An answer is under way, or will be once the mesh has one: of this request, or of one before it."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return cycle.response_started or not self._awaits_body or bool(self.pipeline)

    def _refuse(self, status: http.HTTPStatus) -> None:
        """Say why, if nothing else is or was said, and close."""
        self._stop_timer()
        has_answer = self._awaits_body and self.cycle is not None and self.cycle.response_complete
        if not self._is_answering() and not has_answer and not self.transport.is_closing():
            self.transport.write(_refusal(status, self.limits))
        self.transport.close()


def _refusal(status: http.HTTPStatus, limits: ConnectionLimits) -> bytes:
    sentences = {
        http.HTTPStatus.REQUEST_TIMEOUT: f"a request's head must come within {limits.head_s:g} s, and its body without "
        f"a pause of more than {limits.body_silence_s:g} s",
        http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"a request's head may have {limits.max_head_bytes} bytes",
    }
    sentence = sentences.get(status, "this is not an HTTP/1.1 request")
    body = encode_json(error_body(InvalidRequestError(sentence)))
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
