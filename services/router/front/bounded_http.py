"""HTTP/1.1 connections with an end to every wait: uvicorn has none for a head or a body that does not come."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers."""
HEAD_S = 10.0
"""For the whole head, from the connection or from its first byte on."""
BODY_SILENCE_S = 30.0
"""Within a body. A slow client may take as long as it likes, as long as something comes."""


class BoundedHttp(HttpToolsProtocol):
    """One connection. What is over a limit gets a JSON error where an answer is still possible, and is closed."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._timer: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._num_head_bytes = 0
        self._heard_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._arm(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._heard_s = self.loop.time()
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()

    # ---- what the parser calls

    def on_message_begin(self) -> None:
        """Of the first or of a further request on this connection."""
        super().on_message_begin()
        self._is_in_head = True
        self._arm(HEAD_S)

    def on_headers_complete(self) -> None:
        """See uvicorn. Raises ValueError, which ends the parse, for a head that is too large."""
        self._is_in_head = False
        self._num_head_bytes = 0
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._is_in_head = True
            raise ValueError("the head is too large")
        self._arm(BODY_SILENCE_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All has come; the answer may take its time."""
        self._disarm()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed."""
        if self._is_in_head and self.headers and self._num_head_bytes == 0:
            self._refuse_head()
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, msg)

    # ---- inside

    def _refuse_head(self) -> None:
        limit = f"the request line and headers take more than {MAX_HEAD_BYTES} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, limit)

    def _arm(self, delay_s: float) -> None:
        self._disarm()
        self._heard_s = self.loop.time()
        self._timer = self.loop.call_later(delay_s, self._look)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _answers_another(self) -> bool:
        """An answer to the request before is under way: it is not cut for what a client sends behind it."""
        is_unfinished = self.cycle is not None and not self.cycle.response_complete
        return bool(self.pipeline) or (self._is_in_head and is_unfinished)

    def _look(self) -> None:
        if self._answers_another():
            self._arm(HEAD_S)
        elif self._is_in_head:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request's head did not come within {HEAD_S:.0f} s")
        elif (left_s := self._heard_s + BODY_SILENCE_S - self.loop.time()) > 0:
            self._timer = self.loop.call_later(left_s, self._look)
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"nothing of the request's body came for {BODY_SILENCE_S:.0f} s")

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self._disarm()
        if self.transport.is_closing():
            return
        has_begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not has_begun:
            error = {"message": sentence, "type": "invalid_request_error", "param": None, "code": status.name.lower()}
            body = json.dumps({"error": error}).encode()
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
