"""Server-sent events out of bytes: data, id, and nothing else that this API uses. Pure.

Standard: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event; `event_id` is the last one that was seen, as the standard has it."""

    data: str
    event_id: str


DONE = "[DONE]"
"""The data of the event that ends a stream of this API."""
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(slots=True)
class LineSplitter:
    """Cuts a stream that comes in pieces into lines. They end at LF, CR LF and CR and nowhere else: an event's text may
    hold U+2028 and other characters at which `str.splitlines`, and with it httpx's `iter_lines`, cuts."""

    _pending: bytes = b""
    _swallows_lf: bool = False
    """The last line ended with a CR: an LF that follows belongs to it."""

    def split(self, piece: bytes) -> list[str]:
        """Returns the lines that this piece completes, without their ends. What no end follows is not a line yet."""
        if self._swallows_lf and piece:
            piece = piece.removeprefix(b"\n")
            self._swallows_lf = False
        data = self._pending + piece
        *lines, self._pending = _LINE_END.split(data)
        self._swallows_lf = bool(lines) and data.endswith(b"\r")
        return [line.decode(errors="replace") for line in lines]


def split_lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yields all lines of a stream, each as soon as it is whole."""
    splitter = LineSplitter()
    for piece in pieces:
        yield from splitter.split(piece)


async def split_lines_async(pieces: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Does as `split_lines` does."""
    splitter = LineSplitter()
    async for piece in pieces:
        for line in splitter.split(piece):
            yield line


@dataclass(slots=True)
class EventParser:
    """Puts events together from lines without their ends; comments are dropped."""

    event_id: str = ""
    _data: list[str] = field(default_factory=list)

    def add(self, line: str) -> ServerEvent | None:
        """Returns the event that this line completes."""
        if not line:
            event = ServerEvent("\n".join(self._data), self.event_id) if self._data else None
            self._data = []
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id":
            self.event_id = value
        return None
