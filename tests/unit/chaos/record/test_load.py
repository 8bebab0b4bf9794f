"""Clients against servers that break, refuse, forget and repeat: what the record says of them."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.record.history import (
    Abandoned,
    Asked,
    ChoiceFinished,
    ConnectionBroken,
    Ended,
    Event,
    Reattached,
    RequestFailed,
    RequestRefused,
    Tokens,
    logprob_bits,
)
from chaos.record.load import AnswerRecorder, ClientLoad, StreamingClient
from chaos.record.requests import ChaosRequest, SuiteLoad
from chaos.record.sse import EventParser, ServerEvent, split_lines

REQUEST = ChaosRequest("request-0", "greedy", {"prompt": "a", "max_tokens": 3})
NUM_TOKENS = 3


def chunk(number: int, with_id: bool = True) -> bytes:
    choice = {
        "index": 0,
        "text": "x",
        "token_ids": [100 + number],
        "logprobs": {"token_logprobs": [-0.5]},
        "finish_reason": "length" if number == NUM_TOKENS - 1 else None,
    }
    event_id = f"id: 0:{number + 1}\n" if with_id else ""
    return f"{event_id}data: {json.dumps({'choices': [choice]})}\n\n".encode()


USAGE = b'data: {"choices":[],"usage":{"completion_tokens":3},"moemesh":{"recoveries":1}}\n\n'
END = USAGE + b"data: [DONE]\n\n"


class Breaking(httpx.AsyncByteStream):
    """Some bytes, then a broken connection."""

    def __init__(self, *parts: bytes) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part
        raise httpx.ReadError("connection reset")


class Silent(httpx.AsyncByteStream):
    """Comments, for ever."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b": keep-alive\n\n"


class Server:
    """Answers by a list of functions, the last one again and again."""

    def __init__(self, *answers: Callable[[httpx.Request], httpx.Response]) -> None:
        self._answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return answer(request)


def breaks(*parts: bytes, request_id: str = "") -> Callable[[httpx.Request], httpx.Response]:
    headers = {"Moemesh-Request-Id": request_id} if request_id else {}
    return lambda request: httpx.Response(200, headers=headers, stream=Breaking(*parts))


def whole(*parts: bytes) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(200, content=b"".join(parts))


def status(number: int, message: str = "no") -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(number, json={"error": {"message": message}})


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


def ask(server: Server, reattach_s: float = 30, deadline_s: float = 30) -> list[Event]:
    record: list[Event] = []
    ticks = itertools.count()

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(server)) as http:
            chosen = SuiteLoad(reattach_within_s=reattach_s, request_deadline_s=deadline_s)
            client = StreamingClient(http, "http://mesh", "tiny", chosen, record.append, lambda: float(next(ticks)))
            await client.ask("op-1", 0, REQUEST)

    asyncio.run(run())
    return record


def kinds(record: list[Event]) -> list[type[Event]]:
    return [type(event) for event in record if not isinstance(event, Asked)]


def tokens(record: list[Event]) -> list[int]:
    return [token_id for event in record if isinstance(event, Tokens) for token_id in event.token_ids]


def test_a_whole_answer_is_its_tokens_with_offsets_and_bits_and_its_end() -> None:
    server = Server(whole(chunk(0), chunk(1), chunk(2), END))
    record = ask(server)
    assert kinds(record) == [Tokens, Tokens, Tokens, ChoiceFinished, Ended]
    assert [e.offset for e in record if isinstance(e, Tokens)] == [0, 1, 2]
    assert {e.logprob_bits for e in record if isinstance(e, Tokens)} == {(logprob_bits(-0.5),)}
    (ended,) = [e for e in record if isinstance(e, Ended)]
    assert ended.usage == {"completion_tokens": 3, "moemesh": {"recoveries": 1}}
    assert server.asked[0].headers["Idempotency-Key"] == "op-1"
    assert server.asked[0].headers["Moemesh-Resumable"] == "1"
    assert json.loads(server.asked[0].content)["return_token_ids"] is True


def test_a_broken_stream_goes_on_after_the_last_event_that_came() -> None:
    server = Server(breaks(chunk(0), chunk(1), request_id="r7"), whole(chunk(2), END))
    record = ask(server)
    assert kinds(record) == [Tokens, Tokens, ConnectionBroken, Reattached, Tokens, ChoiceFinished, Ended]
    assert tokens(record) == [100, 101, 102]
    again = server.asked[1]
    assert (again.method, again.url.path, again.headers["Last-Event-ID"]) == ("GET", "/v1/requests/r7/events", "0:2")


def test_a_server_that_repeats_tokens_after_a_break_is_seen_to_do_so() -> None:
    record = ask(Server(breaks(chunk(0), chunk(1), request_id="r7"), whole(chunk(1), chunk(2), END)))
    assert tokens(record) == [100, 101, 101, 102]


def test_a_break_is_an_error_where_the_server_keeps_no_streams() -> None:
    record = ask(Server(breaks(chunk(0))))
    assert kinds(record) == [Tokens, ConnectionBroken, RequestFailed]
    assert isinstance(record[-1], RequestFailed)
    assert record[-1].code == "connection_lost"


@pytest.mark.parametrize("number", [404, 410])
def test_a_server_that_has_forgotten_the_stream_has_lost_it(number: int) -> None:
    record = ask(Server(breaks(chunk(0), request_id="r7"), status(number, "unknown request")))
    assert isinstance(record[-1], RequestFailed)
    assert (record[-1].code, record[-1].status) == ("not_resumable", number)


def test_a_router_that_is_away_is_asked_again_until_it_is_back() -> None:
    server = Server(breaks(chunk(0), request_id="r7"), unreachable, status(503), whole(chunk(1), chunk(2), END))
    record = ask(server)
    assert kinds(record) == [
        Tokens,
        ConnectionBroken,
        ConnectionBroken,
        ConnectionBroken,
        Reattached,
        Tokens,
        Tokens,
        ChoiceFinished,
        Ended,
    ]


def test_a_post_that_never_got_an_answer_is_sent_again_with_the_same_key() -> None:
    server = Server(unreachable, whole(chunk(0), chunk(1), chunk(2), END))
    record = ask(server)
    assert kinds(record) == [ConnectionBroken, Tokens, Tokens, Tokens, ChoiceFinished, Ended]
    assert [request.method for request in server.asked] == ["POST", "POST"]
    assert len({request.headers["Idempotency-Key"] for request in server.asked}) == 1


def test_a_busy_server_is_a_refusal_and_not_an_error_while_patience_lasts() -> None:
    record = ask(Server(status(503), status(429), whole(chunk(0), chunk(1), chunk(2), END)))
    assert kinds(record)[:2] == [RequestRefused, RequestRefused]
    assert isinstance(record[-1], Ended)
    record = ask(Server(status(503)), reattach_s=5)
    assert isinstance(record[-1], RequestFailed)


def test_a_server_that_does_not_come_back_has_lost_the_request() -> None:
    record = ask(Server(breaks(chunk(0), request_id="r7"), unreachable), reattach_s=5)
    assert isinstance(record[-1], RequestFailed)
    assert record[-1].code == "connection_lost"


def test_other_refusals_are_errors() -> None:
    record = ask(Server(status(400, "wrong field")))
    assert isinstance(record[-1], RequestFailed)
    assert (record[-1].code, record[-1].message) == ("http_400", "wrong field")


def test_an_error_event_is_the_servers_own_code() -> None:
    error = b'data: {"error":{"message":"stage-1 is gone","type":"server_error","code":"node_lost"}}\n\n'
    record = ask(Server(whole(chunk(0), error, b"data: [DONE]\n\n")))
    assert kinds(record) == [Tokens, RequestFailed]
    assert isinstance(record[-1], RequestFailed)
    assert record[-1].code == "node_lost"


def test_an_end_before_all_choices_have_ended_is_an_error() -> None:
    record = ask(Server(whole(chunk(0), b"data: [DONE]\n\n")))
    assert isinstance(record[-1], RequestFailed)
    assert record[-1].code == "ended_early"


@pytest.mark.parametrize("garbage", [b"data: {\n\n", b"data: []\n\n", b'data: {"choices":[{}]}\n\n'])
def test_what_cannot_be_read_is_an_error_of_its_own(garbage: bytes) -> None:
    record = ask(Server(whole(chunk(0), garbage)))
    assert isinstance(record[-1], RequestFailed)
    assert record[-1].code == "unreadable"


def test_a_stream_of_comments_only_is_given_up_at_the_deadline() -> None:
    record = ask(Server(lambda request: httpx.Response(200, stream=Silent())), deadline_s=0.1)
    assert kinds(record) == [Abandoned]


def test_streams_ask_until_they_are_stopped_and_every_operation_has_its_own_name() -> None:
    record: list[Event] = []
    server = Server(whole(chunk(0), chunk(1), chunk(2), END))

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(server)) as http:
            client = StreamingClient(http, "http://mesh", "tiny", SuiteLoad(), record.append, lambda: 0.0)
            requests = [ChaosRequest(f"request-{n}", "greedy", REQUEST.fields) for n in range(3)]
            await ClientLoad(client, requests, 2, "once").run_once()
            once = [e.request for e in record if isinstance(e, Asked)]
            assert sorted(once) == ["request-0", "request-1", "request-2"]
            load = ClientLoad(client, requests, 3, "run")
            load.start()
            await asyncio.sleep(0.1)
            load.stop()
            await load.join(5)

    asyncio.run(run())
    names = [event.operation for event in record if isinstance(event, Asked)]
    assert len(set(names)) == len(names) > 9
    assert sum(isinstance(event, Ended) for event in record) == len(names)


def parse(*lines: str) -> list[ServerEvent]:
    parser = EventParser()
    return [event for line in lines if (event := parser.add(line)) is not None]


def test_events_carry_the_last_id_and_comments_are_nothing() -> None:
    assert parse(": hi", "", "id: 4", "data: a", "data:b", "", "data: c", "") == [
        ServerEvent("a\nb", "4"),
        ServerEvent("c", "4"),
    ]


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=5)),
    st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1),
    st.integers(1, 7),
)
def test_lines_end_at_lf_and_cr_and_nowhere_else_however_the_bytes_come(
    lines: list[str], ends: list[str], piece_bytes: int
) -> None:
    # An empty line between a CR and an LF cannot be told from one end of two characters.
    ends = ends if "\r" not in ends or "\n" not in ends else ["\r\n"]
    data = "".join(line + end for line, end in zip(lines, itertools.cycle(ends), strict=False)).encode()
    pieces = [data[start : start + piece_bytes] for start in range(0, len(data), piece_bytes)]
    assert list(split_lines([*pieces, b"no end"])) == lines


def test_an_answer_may_hold_any_character() -> None:
    text = "a\u2028b\u2029c\x85d"
    first = json.dumps({"choices": [{"index": 0, "text": text, "token_ids": [5]}]}, ensure_ascii=False)
    (event,) = [*parse(*split_lines([f"data: {first}\n\n".encode()]))]
    assert json.loads(event.data)["choices"][0]["text"] == text


def test_nothing_is_taken_after_the_end() -> None:
    record: list[Any] = []
    answer = AnswerRecorder("op", 1, record.append, lambda: 0.0)
    for data in (chunk(2).decode().split("data: ")[1].strip(), "[DONE]", "[DONE]"):
        answer.add(ServerEvent(data, ""))
    assert [type(event) for event in record] == [Tokens, ChoiceFinished, Ended]
