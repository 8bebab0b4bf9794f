"""A router that is a function, for what asks it over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx

Answer = Callable[[httpx.Request], httpx.Response]


def events(*payloads: Any) -> bytes:
    return b"".join(
        b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"
        for payload in payloads
    )


def text_events(path: str, *pieces: str) -> bytes:
    choices = [{"text": piece} if "chat" not in path else {"delta": {"content": piece}} for piece in pieces]
    return events(*({"choices": [choice]} for choice in choices), b"[DONE]")


def mesh(request: httpx.Request) -> httpx.Response:
    """A mesh that repeats what it was asked."""
    if request.url.path == "/v1/models":
        return httpx.Response(200, json={"data": [{"id": "tiny"}]})
    if request.url.path == "/ready":
        return httpx.Response(200, json={"ready": True, "detail": "1 pipelines"})
    if request.url.path == "/mesh":
        nodes = [
            {"node": "stage-1", "role": "holder", "slot": {"pipeline": 0, "index": 1}, "state": "alive"}
            | {"process": "here/42", "shards": None, "rows": 40, "busy_seconds": 1.5},
            {"node": "expert-1", "role": "expert", "slot": None, "state": "alive"}
            | {"process": "here/43", "shards": 7, "rows": None, "busy_seconds": None},
        ]
        return httpx.Response(200, json={"nodes": nodes})
    if request.url.path == "/metrics":
        return httpx.Response(200, text='# HELP x\nmoemesh_ready 1.0\nmoemesh_ttft_bucket{le="1"} 3\nother 2\n')
    body = json.loads(request.content)
    assert body["model"] == "tiny"
    assert body["stream"] is True
    asked = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
    return httpx.Response(
        200, content=b": a comment keeps the line open\n\n" + text_events(request.url.path, "you said ", asked)
    )


def without_template(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/v1/chat/completions":
        message = "this model has no chat template; use /v1/completions"
        return httpx.Response(400, json={"error": {"message": message}})
    return mesh(request)


def client_of(answer: Answer) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://mesh")


class Breaking(httpx.SyncByteStream):
    """A connection that breaks after its bytes."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __iter__(self) -> Iterator[bytes]:
        yield self._content
        raise httpx.ReadError("reset by peer")


def refused(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")
