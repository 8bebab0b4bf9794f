"""What is made of a router's answers: pieces of text, sentences, and another try."""

from __future__ import annotations

import json

import httpx
import pytest

from common.errors import MoemeshError
from compose.answers import RESUME_PATIENCE_S, served_model, stream_pieces
from tests.support.served.fake_router import Breaking, client_of, events


def test_an_error_in_mid_stream_is_the_servers_own_sentence() -> None:
    content = events({"choices": [{"text": "so"}]}, {"error": {"message": "stage-1 is gone"}})
    pieces = stream_pieces(client_of(lambda request: httpx.Response(200, content=content)), "/v1/completions", {})
    assert next(pieces) == "so"
    with pytest.raises(MoemeshError, match="stage-1 is gone"):
        next(pieces)


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (httpx.Response(429, json={"error": {"message": "come back in 3 s"}}), "come back in 3 s"),
        (httpx.Response(502, text="<html>bad gateway</html>"), "HTTP 502"),
        (httpx.Response(500, json={"detail": "?"}), "HTTP 500"),
        (httpx.Response(500, json=[]), "HTTP 500"),
        (httpx.Response(404), "HTTP 404"),
    ],
)
def test_a_refusal_is_said_in_a_sentence_whoever_answers(reply: httpx.Response, sentence: str) -> None:
    with pytest.raises(MoemeshError, match=sentence):
        list(stream_pieces(client_of(lambda request: reply), "/v1/completions", {}))
    with pytest.raises(MoemeshError, match=sentence):
        served_model(client_of(lambda request: reply))


@pytest.mark.parametrize("is_clean_end", [False, True])
def test_a_broken_stream_is_gone_on_with_where_it_was(is_clean_end: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    asked: list[httpx.Request] = []
    part = b"id: 1\n" + events({"choices": [{"text": "one "}]})
    resumable = {"Moemesh-Request-Id": "cmpl-1"}

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if len(asked) == 1:
            stream = httpx.ByteStream(part) if is_clean_end else Breaking(part)
            return httpx.Response(200, stream=stream, headers=resumable)
        if len(asked) == 2:
            raise httpx.ConnectError("the router is away")
        return httpx.Response(200, content=events({"choices": [{"text": "two"}]}, b"[DONE]"), headers=resumable)

    assert "".join(stream_pieces(client_of(answer), "/v1/completions", {})) == "one two"
    first, *rest = asked
    assert (first.method, first.headers["moemesh-resumable"]) == ("POST", "1")
    for request in rest:
        assert request.url.path == f"/v1/requests/{first.headers['x-request-id']}/events"
        assert request.headers["last-event-id"] == "1"


def test_a_stream_that_nobody_can_go_on_with_is_an_error() -> None:
    part = events({"choices": [{"text": "one "}]})
    pieces = stream_pieces(client_of(lambda request: httpx.Response(200, stream=Breaking(part))), "/v1/completions", {})
    assert next(pieces) == "one "
    with pytest.raises(httpx.ReadError):
        next(pieces)


def test_pieces_without_text_are_empty() -> None:
    content = events(
        {"choices": [{"delta": {"role": "assistant"}}]}, {"choices": []}, {"choices": [{"text": ""}]}, b"[DONE]"
    )
    pieces = stream_pieces(client_of(lambda request: httpx.Response(200, content=content)), "/v1/completions", {})
    assert "".join(pieces) == ""


@pytest.mark.parametrize("data", [b"no json", b"[]", b"{}", b'{"choices": 1}', b'{"choices": [[]]}', b'{"error": "x"}'])
def test_an_event_that_is_none_of_a_reply_is_a_sentence(data: bytes) -> None:
    client = client_of(lambda request: httpx.Response(200, content=b"data: " + data + b"\n\n"))
    with pytest.raises(MoemeshError, match="no moemesh router"):
        list(stream_pieces(client, "/v1/completions", {}))


def test_a_router_that_does_not_come_back_is_not_looked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("tenacity.time.monotonic", lambda: now_s[0])
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: now_s.__setitem__(0, now_s[0] + seconds))
    part = b"id: 1\n" + events({"choices": [{"text": "one "}]})

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            raise httpx.ConnectError("refused")
        return httpx.Response(200, stream=Breaking(part), headers={"Moemesh-Request-Id": "cmpl-1"})

    pieces = stream_pieces(client_of(answer), "/v1/completions", {})
    assert next(pieces) == "one "
    with pytest.raises(httpx.ConnectError):
        next(pieces)
    assert RESUME_PATIENCE_S <= now_s[0] < RESUME_PATIENCE_S + 5


ODD_TEXT = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"


def test_no_character_of_an_answer_ends_a_line() -> None:
    content = json.dumps({"choices": [{"text": ODD_TEXT}]}, ensure_ascii=False).encode()
    body = b"data: " + content + b"\n\n" + events(b"[DONE]")
    client = client_of(lambda request: httpx.Response(200, content=body))
    assert list(stream_pieces(client, "/v1/completions", {})) == [ODD_TEXT]
