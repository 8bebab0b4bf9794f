"""A client of an ASGI application without sockets: sends a body in pieces, reads the answer in pieces, may go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def data(self) -> list[Any]:
        """Payloads of the server-sent events, decoded but for the closing `[DONE]`."""
        payloads = [
            line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line.startswith("data: ")
        ]
        return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


class Exchange:
    """One request, begun by `start`; the body is whole unless `pieces` are given."""

    def __init__(
        self,
        app: ASGIApp,
        method: str,
        path: str,
        *,
        fields: object = None,
        pieces: Sequence[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._app = app
        body = [] if fields is None else [json.dumps(fields).encode()]
        self._pieces = list(body if pieces is None else pieces) or [b""]
        self.pieces_read = 0
        encoded = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": encoded,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self._gone = asyncio.Event()
        self._answered: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> Exchange:
        self._task = asyncio.create_task(self._app(self._scope, self._receive, self._send))  # type: ignore[arg-type]
        return self

    def disconnect(self) -> None:
        """The client goes away."""
        self._gone.set()

    async def next_message(self) -> Message:
        """`http.response.start` or a piece of the body."""
        return await asyncio.wait_for(self._answered.get(), _PATIENCE_S)

    async def wait_ended(self) -> None:
        """Until the application has left; raises what it raised."""
        assert self._task is not None
        await asyncio.wait_for(asyncio.shield(self._task), _PATIENCE_S)

    async def answer(self) -> Answer:
        """All of it."""
        start = await self.next_message()
        body = b""
        more = True
        while more:
            message = await self.next_message()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await self.wait_ended()
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], headers, body)

    async def _receive(self) -> Message:
        if self.pieces_read < len(self._pieces):
            piece = self._pieces[self.pieces_read]
            self.pieces_read += 1
            return {"type": "http.request", "body": piece, "more_body": self.pieces_read < len(self._pieces)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self._answered.put(message)


async def ask(app: ASGIApp, method: str, path: str, fields: object = None, **settings: Any) -> Answer:
    """A whole exchange."""
    return await Exchange(app, method, path, fields=fields, **settings).start().answer()
