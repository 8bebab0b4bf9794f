"""Sockets that exist in memory only, with the face of `common.wire.transport`: what is sent lies in a list."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from common.errors import SocketError
from common.messages import Header, Message
from common.wire.codec import decode, encode
from common.wire.transport import Full, LinkEvent


class MemorySocket:
    """Connected to nobody; the test is the peer: `sent` is what the peer got, `answers` what it says."""

    def __init__(self, name: str, endpoint: str, identity: bytes = b"") -> None:
        self.name = name
        self.endpoints = (endpoint,)
        self.identity = identity
        self.raw = self.monitor = object()
        self.sent: list[tuple[Any, Header]] = []
        self.answers: deque[tuple[Message, Header]] = deque()
        self.events: deque[LinkEvent] = deque()
        self.takes_messages = True
        self.is_closed = False
        self.bytes_sent = 0

    def send(self, message: Message, header: Header) -> None:
        """The message as its receiver would have it, or Full."""
        assert not self.is_closed, f"{self.name} is closed"
        if not self.takes_messages:
            raise Full(f"{self.name}: the peer does not take messages")
        frames = [bytes(frame) for frame in encode(message, header)]
        self.bytes_sent += sum(map(len, frames))
        self.sent.append(decode([bytearray(frame) for frame in frames]))  # type: ignore[misc]

    def receive(self) -> tuple[Message, Header] | None:
        """The next answer."""
        return self.answers.popleft() if self.answers else None

    def link_events(self) -> list[LinkEvent]:
        """What happened since the last call."""
        events = list(self.events)
        self.events.clear()
        return events

    def close(self) -> None:
        """Nothing more may be sent."""
        self.is_closed = True

    # the test's side

    def say(self, message: Message, header: Header | None = None) -> None:
        """Let the peer say something."""
        self.answers.append((message, header or Header()))

    def take_sent(self) -> list[tuple[Any, Header]]:
        """What was sent since the last call."""
        sent, self.sent = self.sent, []
        return sent


class MemoryTransport:
    """Hands out memory sockets and keeps them, by name."""

    def __init__(self) -> None:
        self.sockets: dict[str, MemorySocket] = {}
        self.has_lost_files = False
        self.num_changes = 0
        self.max_open = 1_000_000
        """So many may be open at a time."""

    def dealer(self, name: str, endpoint: str, identity: bytes = b"") -> MemorySocket:
        """A new one; an older one of the same name must be closed."""
        assert name not in self.sockets or self.sockets[name].is_closed, f"{name} is open twice"
        if sum(not socket.is_closed for socket in self.sockets.values()) >= self.max_open:
            raise SocketError(f"{name}: no socket can be opened")
        self.sockets[name] = MemorySocket(name, endpoint, identity)
        return self.sockets[name]

    def push(self, name: str, endpoint: str, *, is_watched: bool = False) -> MemorySocket:
        """As `dealer`."""
        return self.dealer(name, endpoint)

    def look_after_files(self, now_s: float, *, at_once: bool = False) -> bool:
        """There are none, unless a test says that they were made again."""
        made_again, self.has_lost_files = self.has_lost_files, False
        return made_again

    def echo(self, endpoint: str, identity: bytes) -> None:
        """Kept as a socket that nobody answers on."""
        self.sockets["echo"] = MemorySocket("echo", endpoint, identity)

    def router(self, name: str, endpoints: Sequence[str]) -> MemorySocket:
        """As `dealer`."""
        return self.dealer(name, endpoints[0])
