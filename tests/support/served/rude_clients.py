"""Clients that vanish: in the middle of their request, before the answer, in the middle of it."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from enum import Enum
from urllib.parse import urlsplit

from tests.support.served.mesh_client import Ask


class Vanishing(Enum):
    """When the client goes."""

    IN_THE_HEAD = "in the head"
    IN_THE_BODY = "in the body"
    BEFORE_THE_ANSWER = "before the answer"
    IN_THE_STREAM = "in the stream"
    IN_THE_STREAM_BY_RESET = "in the stream, by reset"


def vanish(url: str, model: str, ask: Ask, when: Vanishing) -> None:
    """One such client, gone when this returns."""
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    streams = when in (Vanishing.IN_THE_STREAM, Vanishing.IN_THE_STREAM_BY_RESET)
    body = json.dumps(ask.body(model) | {"stream": streams}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection((host, port), timeout=60) as connection:
        _PARTS[when](connection, head, body)
        if when is Vanishing.IN_THE_STREAM_BY_RESET:
            # Closing sends RST in place of FIN.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _send_half_of_the_head(connection: socket.socket, head: bytes, body: bytes) -> None:
    connection.sendall(head[: len(head) // 2])


def _send_half_of_the_body(connection: socket.socket, head: bytes, body: bytes) -> None:
    connection.sendall(head + body[: len(body) // 2])


def _send_everything(connection: socket.socket, head: bytes, body: bytes) -> None:
    connection.sendall(head + body)


def _read_some_events(connection: socket.socket, head: bytes, body: bytes) -> None:
    _send_everything(connection, head, body)
    received = b""
    while received.count(b"data: ") < 3:
        piece = connection.recv(4096)
        if not piece:
            raise AssertionError(f"the server closed the stream: {received[-500:]!r}")
        received += piece


_PARTS: dict[Vanishing, Callable[[socket.socket, bytes, bytes], None]] = {
    Vanishing.IN_THE_HEAD: _send_half_of_the_head,
    Vanishing.IN_THE_BODY: _send_half_of_the_body,
    Vanishing.BEFORE_THE_ANSWER: _send_everything,
    Vanishing.IN_THE_STREAM: _read_some_events,
    Vanishing.IN_THE_STREAM_BY_RESET: _read_some_events,
}
