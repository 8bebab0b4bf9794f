"""What a client may leave out, and for how long; what it may send too much of."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from uvicorn.server import ServerState

from services.router.front.http import server as front_server
from services.router.front.http.answers import ConnectionLimits
from services.router.front.http.server import FrontProtocol, FrontServer
from services.router.front.metrics import ConnectionMetrics
from tests.support.front.front_connection import GET, HEAD, Connection, Timers, front_config, run


@pytest.mark.parametrize("part", [b"P", HEAD[:9], HEAD[:30], HEAD[:-1]])
def test_a_head_that_is_not_complete_in_time_is_refused(part: bytes) -> None:
    async def work(connection: Connection) -> None:
        await connection.send(part[:1])
        connection.timers.pass_time(6)
        await connection.send(part[1:])
        connection.timers.pass_time(3.9)
        assert not connection.is_closed
        connection.timers.pass_time(0.2)
        assert (connection.status, connection.is_closed) == (408, True)
        assert json.loads(connection.answered.split(b"\r\n\r\n")[1])["error"]["code"] == "invalid_request"

    run(work)


def test_a_connection_without_a_request_is_closed_without_a_word() -> None:
    async def work(connection: Connection) -> None:
        await connection.send(b"\r\n")
        connection.timers.pass_time(10)
        assert (connection.answered, connection.is_closed) == (b"", True)

    run(work)


@pytest.mark.parametrize("head", [HEAD, HEAD.replace(b"Content-Length: 10", b"Transfer-Encoding: chunked")])
def test_a_body_is_refused_after_a_silence_and_not_for_being_slow(head: bytes) -> None:
    async def work(connection: Connection) -> None:
        await connection.send(head)
        for _ in range(4):
            connection.timers.pass_time(29)
            await connection.send(b"x" if head is HEAD else b"1\r\nx\r\n")
        assert not connection.is_closed
        connection.timers.pass_time(31)
        await connection.settle()
        assert (connection.status, connection.is_closed) == (408, True)

    run(work)


@pytest.mark.parametrize("behind", [HEAD[:20], HEAD + b"abc"], ids=["half a head", "half a body"])
def test_an_answer_is_not_cut_whatever_its_client_leaves_unsaid(behind: bytes) -> None:
    async def work(connection: Connection) -> None:
        await connection.send(GET, behind)
        connection.timers.pass_time(1000)
        assert (connection.status, connection.is_closed) == (200, False)
        connection.may_answer.set()
        await connection.settle()
        first, end, _ = connection.answered.partition(b"last\r\n0\r\n\r\n")
        assert (first.startswith(b"HTTP/1.1 200"), bool(end)) == (True, True)
        connection.timers.pass_time(31)
        assert connection.is_closed, "the half request has its own end"

    run(work)


def test_between_requests_and_for_the_next_one_there_is_new_time() -> None:
    async def work(connection: Connection) -> None:
        connection.may_answer.set()
        for _ in range(3):
            await connection.send(GET)
            connection.timers.pass_time(4)
            await connection.send(GET[:8])
            connection.timers.pass_time(9)
            await connection.send(GET[8:])
        assert connection.answered.count(b"HTTP/1.1 200") == 6
        assert not connection.is_closed
        for _ in range(20):
            connection.timers.pass_time(1)
            await connection.send(b"\r\n")
        assert connection.is_closed, "empty lines are no request"

    run(work, ConnectionLimits(keep_alive_s=5))


def test_a_body_has_an_end_however_regularly_it_comes() -> None:
    async def work(connection: Connection) -> None:
        await connection.send(HEAD.replace(b"10", b"1000"))
        for _ in range(119):
            connection.timers.pass_time(1)
            await connection.send(b"x")
        assert not connection.is_closed
        connection.timers.pass_time(1.5)
        assert (connection.status, connection.is_closed) == (408, True)

    run(work)


def test_a_body_behind_an_answer_has_its_time_when_that_is_over() -> None:
    async def work(connection: Connection) -> None:
        await connection.send(GET, HEAD + b"abc")
        connection.timers.pass_time(1000)
        connection.may_answer.set()
        await connection.settle()
        await connection.send(b"defghij")
        assert connection.answered.count(b"HTTP/1.1 200") == 2

    run(work)


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"


@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
@pytest.mark.parametrize(
    "offer",
    [H2C, b"connection: keep-alive, UPGRADE\r\nupgrade: websocket\r\n", b"Upgrade: a\r\nConnection: upgrade\r\n"],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_an_offer_to_upgrade_is_ignored_and_the_body_is_read(offer: bytes, is_chunked: bool, piece_bytes: int) -> None:
    async def work(connection: Connection) -> None:
        connection.may_answer.set()
        head, body = HEAD[:-2] + offer + b"\r\n", b"0123456789"
        if is_chunked:
            head = head.replace(b"Content-Length: 10", b"Transfer-Encoding: chunked")
            body = b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n"
        data = (head + body) * 2 + GET
        await connection.send(*(data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes)))
        assert connection.body == b"0123456789" * 2
        assert connection.answered.count(b"HTTP/1.1 200") == 3
        assert not connection.is_closed

    run(work)


def test_a_client_of_http_1_0_gets_no_chunks_and_an_end_by_the_end_of_the_connection() -> None:
    async def work(connection: Connection) -> None:
        head = HEAD.replace(b"1.1", b"1.0")[:-2] + b"Expect: 100-continue\r\n\r\n"
        await connection.send(head + b"0123456789")
        assert connection.answered.endswith(b"\r\n\r\nfirst"), "what there is comes at once"
        connection.may_answer.set()
        await connection.settle()
        head, _, body = connection.answered.partition(b"\r\n\r\n")
        assert (b"transfer-encoding" in head, b"connection: close" in head) == (False, True)
        assert (body, connection.is_closed) == (b"firstlast", True)

    run(work)


def test_a_client_that_takes_too_little_of_its_answer_is_cut_and_one_that_is_slow_is_not() -> None:
    async def work(connection: Connection) -> None:
        await connection.send(GET)
        connection.unread_bytes = 1 << 20
        connection.protocol.pause_writing()
        for _ in range(20):
            connection.unread_bytes -= 20_000
            connection.timers.pass_time(30)
        assert not connection.is_cut
        connection.timers.pass_time(30)
        connection.unread_bytes -= 10_000
        connection.timers.pass_time(30)
        assert connection.is_cut

    run(work)


def test_what_a_closed_connection_has_left_to_say_is_not_kept_for_ever() -> None:
    async def work(connection: Connection) -> None:
        connection.may_answer.set()
        await connection.send(GET)
        connection.unread_bytes = 100
        connection.timers.pass_time(61)
        assert connection.is_cut

    run(work)


def test_an_answer_that_waits_for_the_mesh_is_not_cut_though_nothing_of_it_is_read() -> None:
    async def work(connection: Connection) -> None:
        await connection.send(GET)
        connection.unread_bytes = 100
        connection.timers.pass_time(600)
        assert not connection.is_cut

    run(work)


def test_one_connection_too_many_takes_the_place_of_the_one_that_was_idle_longest() -> None:
    async def main() -> None:
        state, timers = ServerState(), Timers()
        limits = ConnectionLimits(max_connections=3)
        asked, first_idle, second_idle = (Connection(limits, state, timers) for _ in range(3))
        await asked.send(GET)
        first_idle.may_answer.set()
        timers.pass_time(1)
        await first_idle.send(GET)
        timers.pass_time(1)
        fourth = Connection(limits, state, timers)
        timers.pass_time(1)
        fifth = Connection(limits, state, timers)
        assert [c.is_closed for c in (asked, first_idle, second_idle, fourth)] == [False, True, True, False]
        await fourth.send(GET)
        await fifth.send(HEAD)
        await fifth.settle()
        sixth = Connection(limits, state, timers)
        await sixth.send(HEAD + b"0123456789")
        assert (sixth.status, sixth.is_closed) == (503, True)
        assert b"retry-after: 1" in sixth.answered
        assert "connections" in json.loads(sixth.answered.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert not asked.is_closed
        for connection in (asked, fourth):
            connection.may_answer.set()
        await fifth.send(b"0123456789")
        await asked.settle()
        assert asked.answered.endswith(b"last\r\n0\r\n\r\n")

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_request_that_is_not_read_yet_is_not_lost_to_a_newcomer() -> None:
    async def main() -> None:
        state, timers = ServerState(), Timers()
        limits = ConnectionLimits(max_connections=2)
        first, second = Connection(limits, state, timers), Connection(limits, state, timers)
        third, fourth = Connection(limits, state, timers), Connection(limits, state, timers)
        for connection in (first, second):
            await connection.send(GET)
            assert connection.status == 200
        await third.send(GET)
        assert (third.status, third.is_closed) == (503, True)
        await fourth.settle()
        assert (fourth.status, fourth.is_closed) == (503, True), "there is no room in which to wait for its request"
        for connection in (first, second):
            connection.may_answer.set()
            await connection.settle()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_refusals_are_bounded_too_and_whoever_finds_no_room_even_for_that_is_told() -> None:
    async def main() -> None:
        state, timers = ServerState(), Timers()
        limits = ConnectionLimits(max_connections=16)
        for _ in range(16):
            await Connection(limits, state, timers).send(HEAD)
        others = [Connection(limits, state, timers) for _ in range(10)]
        for other in others:
            await other.settle()
        waiting = [other for other in others if not other.is_closed]
        assert len(waiting) == 3
        assert len(state.connections) == 19
        for told in set(others) - set(waiting):
            assert (told.status, told.is_cut) == (503, False)
            assert b"retry-after: 1\r\n" in told.answered
        timers.pass_time(1.1)
        assert all(other.is_closed for other in waiting), "one that is refused has less time to ask"

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("line", [b"X-A: " + b"a" * 100_000, b"\r\n".join([b"X-B: b"] * 12_000)])
@pytest.mark.parametrize("piece_bytes", [1000, 1 << 20])
def test_a_head_that_is_too_long_is_refused(line: bytes, is_whole: bool, piece_bytes: int) -> None:
    async def work(connection: Connection) -> None:
        head = GET[:-2] + line + (b"\r\n\r\n" if is_whole else b"")
        if not is_whole:
            head += b"a" * 70_000
        await connection.send(*(head[at : at + piece_bytes] for at in range(0, len(head), piece_bytes)))
        if not is_whole and piece_bytes > len(head):
            await connection.send(b"a" * 70_000)  # what is read at once is bounded by the socket's buffer
        assert (connection.status, connection.is_closed) == (431, True)
        assert connection.answered.count(b"HTTP/1.1") == 1

    run(work)


def test_what_follows_a_body_is_bounded_like_a_head() -> None:
    async def work(connection: Connection) -> None:
        await connection.send(HEAD.replace(b"Content-Length: 10", b"Transfer-Encoding: chunked"))
        await connection.send(b"1\r\nx\r\n0\r\n", *[b"X-Trailer: " + b"a" * 1000 + b"\r\n"] * 70)
        assert (connection.status, connection.is_closed) == (431, True)

    run(work)


def test_long_bodies_in_large_and_small_pieces_are_no_heads() -> None:
    async def work(connection: Connection) -> None:
        connection.may_answer.set()
        for size in (300_000, 40):
            head = HEAD.replace(b"10", str(600_000).encode())
            await connection.send(head, *[b"x" * size] * (600_000 // size))
        chunk = b"1\r\nx\r\n"
        chunked = HEAD.replace(b"Content-Length: 10", b"Transfer-Encoding: chunked")
        await connection.send(chunked, *[chunk] * 20_000, b"0\r\n\r\n")
        assert connection.answered.count(b"HTTP/1.1 200") == 3
        head = GET[:-2] + b"X-A: " + b"a" * 60_000 + b"\r\n\r\n"
        await connection.send(head)
        assert connection.answered.count(b"HTTP/1.1 200") == 4

    run(work)


def test_bytes_that_are_no_request_are_refused_in_openais_shape() -> None:
    async def work(connection: Connection) -> None:
        await connection.send(b"\x16\x03\x01\x02\x00")
        assert (connection.status, connection.is_closed) == (400, True)
        assert set(json.loads(connection.answered.split(b"\r\n\r\n")[1])["error"]) == {
            "message",
            "type",
            "param",
            "code",
        }

    run(work)


def test_a_second_request_that_asks_for_nothing_is_refused_as_a_first_one_is() -> None:
    async def work(connection: Connection) -> None:
        connection.may_answer.set()
        await connection.send(GET)
        await connection.send(b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n")
        assert connection.answered.partition(b"last\r\n0\r\n\r\n")[2].startswith(b"HTTP/1.1 400")
        assert connection.is_closed

    run(work)


def test_connections_that_the_server_ends_are_counted_by_the_reason() -> None:
    async def main() -> None:
        state, timers, metrics = ServerState(), Timers(), ConnectionMetrics(CollectorRegistry())
        limits = ConnectionLimits(max_connections=2)

        def connect() -> Connection:
            return Connection(limits, state, timers, metrics)

        def counts() -> dict[str, float]:
            (family,) = metrics.ended.collect()
            return {s.labels["why"]: s.value for s in family.samples if s.name.endswith("_total") and s.value}

        first, second = connect(), connect()
        await first.send(HEAD)
        timers.pass_time(1)
        third = connect()
        assert (second.is_cut, counts()) == (True, {"displaced": 1})
        await third.send(b"no request\r\n\r\n")
        assert counts() == {"displaced": 1, "invalid": 1}
        fourth = connect()
        await fourth.send(HEAD)
        await connect().send(GET)
        connect()
        assert counts() == {"displaced": 1, "invalid": 1, "refused": 2}
        await first.settle()
        assert metrics.open._value.get() == 3
        timers.pass_time(31)
        await first.settle()
        assert counts() == {"displaced": 1, "invalid": 1, "refused": 2, "late": 2}
        assert metrics.open._value.get() == 0

    asyncio.run(asyncio.wait_for(main(), 20))


def test_the_router_serves_with_these_limits() -> None:
    server = FrontServer(front_config(Connection.app), lambda: None)  # type: ignore[arg-type]
    assert server.config.http is FrontProtocol
    assert server.config.timeout_keep_alive == 75
    assert server.config.ws == "none"


@pytest.mark.parametrize("may_finish", [False, True])
def test_what_is_under_way_when_the_server_ends_has_its_time_or_is_given_up_where_nothing_comes(
    monkeypatch: pytest.MonkeyPatch, may_finish: bool
) -> None:
    monkeypatch.setattr(front_server, "PATIENCE_S", 0.2)
    monkeypatch.setattr(front_server, "LOOK_S", 0.05)
    given_up: list[float] = []

    async def main() -> None:
        app: Any = Connection.app
        began_s = time.monotonic()
        server = FrontServer(
            front_config(app), lambda: None, lambda: given_up.append(time.monotonic() - began_s), lambda: may_finish
        )
        await server._end_rest()

    asyncio.run(main())
    assert len(given_up) == 1
    assert (given_up[0] >= 0.2) == may_finish
