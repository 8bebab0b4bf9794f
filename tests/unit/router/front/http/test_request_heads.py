"""Which host a request names, and where it ends."""

from __future__ import annotations

import json

import pytest
from starlette.types import Receive, Scope, Send

from tests.support.front.front_connection import GET, HEAD, Connection, run


def test_bytes_behind_a_request_that_are_none_end_the_connection_after_its_answer() -> None:
    """A body whose length its client did not announce."""

    async def work(connection: Connection) -> None:
        await connection.send(GET + b'{"model": "m"}', b'{"model": "m"}')
        assert not connection.is_closed
        connection.may_answer.set()
        await connection.settle()
        assert connection.answered.startswith(b"HTTP/1.1 200")
        assert connection.answered.endswith(b"last\r\n0\r\n\r\n")
        assert connection.is_closed

    run(work)


def test_such_bytes_without_end_are_not_read_for_ever() -> None:
    async def work(connection: Connection) -> None:
        await connection.send(GET + b"{", *[b"{" * 1000] * 70)
        assert connection.is_closed

    run(work)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /x HTTP/1.1\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n",
        b"GET /x HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: h:port\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: user@h\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: [::1]h\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a, b\r\n\r\n",
        b"GET http://h/x HTTP/1.1\r\n\r\n",
    ],
)
def test_a_request_names_one_host(head: bytes) -> None:
    async def work(connection: Connection) -> None:
        connection.may_answer.set()
        await connection.send(head)
        assert (connection.status, connection.is_closed) == (400, True)
        assert "Host" in json.loads(connection.answered.split(b"\r\n\r\n")[1])["error"]["message"]

    run(work)


@pytest.mark.parametrize(
    ("head", "host"),
    [
        (b"GET http://evil.example:80/x HTTP/1.1\r\nHost: localhost\r\n\r\n", b"evil.example:80"),
        (b"GET http://[::1]:8/x HTTP/1.1\r\nHost: h\r\n\r\n", b"[::1]:8"),
        (b"GET /x HTTP/1.1\r\nHost: h:8\r\n\r\n", b"h:8"),
        (b"GET /x HTTP/1.1\r\nHost:\r\n\r\n", b""),
        (b"GET /x HTTP/1.0\r\n\r\n", None),
    ],
)
def test_the_host_of_a_whole_address_stands_before_the_header(head: bytes, host: bytes | None) -> None:
    async def work(connection: Connection) -> None:
        connection.may_answer.set()
        await connection.send(head)
        assert connection.status == 200
        assert dict(connection.protocol.scope["headers"]).get(b"host") == host

    run(work)


def test_an_answer_before_a_body_that_waits_to_be_asked_for_ends_the_connection() -> None:
    """What the client sends next could be taken for that body."""

    async def at_once(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def work(connection: Connection) -> None:
        connection.protocol.app = at_once
        await connection.send(HEAD[:-2] + b"Expect: 100-continue\r\n\r\n")
        assert (connection.status, connection.is_closed) == (413, True)
        assert b"connection: close\r\n" in connection.answered

    run(work)


def test_a_body_that_was_asked_for_leaves_the_connection_open() -> None:
    async def work(connection: Connection) -> None:
        connection.may_answer.set()
        await connection.send(HEAD[:-2] + b"Expect: 100-continue\r\n\r\n", b"0123456789")
        assert connection.answered.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
        assert not connection.is_closed

    run(work)


def test_a_request_without_a_body_leaves_the_connection_open_whatever_it_expects() -> None:
    async def work(connection: Connection) -> None:
        connection.may_answer.set()
        await connection.send(GET[:-2] + b"Expect: 100-continue\r\n\r\n")
        assert (connection.status, connection.is_closed) in {(200, False), (100, False)}

    run(work)
