"""Asking a mesh for one answer over its HTTP API, streamed, also over breaks of the connection."""

from __future__ import annotations

import contextlib
import itertools
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from chaos.record.sse import DONE, EventParser, split_lines
from common.errors import MoemeshError
from compose.router_client import open_client

RESUME_PATIENCE_S = 30.0
"""How long to look for a router that went away."""


def stream_answer(url: str, question: str, max_tokens: int, temperature: float) -> Iterator[str]:
    """Yields the pieces of one answer. Raises httpx.HTTPError, or MoemeshError with the server's own sentence."""
    with open_client(url, httpx.Timeout(10, read=300)) as client:
        yield from ask_model(client, question, question, max_tokens, temperature).pieces


@dataclass(frozen=True, slots=True)
class Asked:
    """A question on its way: what was asked of which path, and its answer piece by piece."""

    path: str
    body: dict[str, Any]
    pieces: Iterator[str]


def ask_model(client: httpx.Client, question: str, prompt: str, max_tokens: int, temperature: float) -> Asked:
    """Asks a question as a chat; where the model has no template for that, lets the model continue `prompt`. Raises as
    `stream_answer` does, and so do the pieces."""
    model = served_model(client)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "stream": True}
    chat = {"model": model, "messages": [{"role": "user", "content": question}], **sampling}
    pieces = stream_pieces(client, "/v1/chat/completions", chat)
    try:
        first = next(pieces, "")
    except MoemeshError as error:
        if "chat template" not in str(error):
            raise
        text = {"model": model, "prompt": prompt, **sampling}
        return Asked("/v1/completions", text, stream_pieces(client, "/v1/completions", text))
    return Asked("/v1/chat/completions", chat, itertools.chain([first], pieces))


def served_model(client: httpx.Client) -> str:
    """Returns the name of the model. Raises as `stream_pieces`."""
    reply = client.get("/v1/models")
    if reply.status_code != 200:
        raise MoemeshError(_sentence(reply))
    try:
        return str(reply.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise MoemeshError("no moemesh router answers there: /v1/models names no model") from None


def _sentence(reply: httpx.Response) -> str:
    """Returns what the server says is wrong; whatever else answers here (a proxy, another program) says it by its
    status."""
    said = told_reason(reply)
    return f"HTTP {reply.status_code}" if said is None else said


def told_reason(reply: httpx.Response) -> str | None:
    """Returns the sentence of an error in OpenAI's form; None for any other answer."""
    try:
        return str(json.loads(reply.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def stream_pieces(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[str]:
    """Yields the text of a streamed reply, piece by piece; comes back for the rest where the connection breaks.

    Raises httpx.HTTPError once that has failed for long, or MoemeshError with the server's sentence.
    """
    stream = _ResumableStream(client, path, body)
    # Waits grow from 0.1 s; a router that was killed is back within seconds.
    attempts = Retrying(
        retry=retry_if_exception_type(httpx.TransportError),
        wait=wait_exponential_jitter(multiplier=0.1, max=2.0, jitter=0.1),
        stop=stop_after_delay(RESUME_PATIENCE_S),
        reraise=True,
    )
    while not stream.is_done:
        lines = stream.begin() if not stream.is_begun else attempts(stream.come_back)
        try:
            yield from stream.pieces(lines)
        except httpx.TransportError:
            if not stream.is_resumable:
                raise


class _ResumableStream:
    """One streamed reply over as many connections as it takes."""

    def __init__(self, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
        self._client = client
        self._path = path
        self._body = body
        self._request_id = f"ask-{uuid.uuid4().hex}"
        self._last_event_id = ""
        self.is_begun = False
        self.is_resumable = False
        """The server has said so; another server than ours does not."""
        self.is_done = False

    def begin(self) -> httpx.Response:
        """Asks. Nothing is asked twice: if this fails, it fails."""
        headers = {"Moemesh-Resumable": "1", "X-Request-Id": self._request_id, "Content-Type": "application/json"}
        # Not by httpx, which raises at numbers that JSON does not have: the server has a sentence for them.
        content = json.dumps(self._body)
        return self._open(self._client.build_request("POST", self._path, content=content, headers=headers))

    def come_back(self) -> httpx.Response:
        """Asks for what comes after the last event that was read."""
        headers = {"Last-Event-ID": self._last_event_id} if self._last_event_id else {}
        return self._open(self._client.build_request("GET", f"/v1/requests/{self._request_id}/events", headers=headers))

    def pieces(self, reply: httpx.Response) -> Iterator[str]:
        """Yields those of one connection, until it ends or breaks."""
        with contextlib.closing(reply):
            parser = EventParser(self._last_event_id)
            for line in split_lines(reply.iter_bytes()):
                event = parser.add(line)
                if event is None:
                    continue
                self._last_event_id = event.event_id
                if event.data == DONE:
                    self.is_done = True
                else:
                    yield _text_of(event.data)
        # Without [DONE] the router has sent us away; a server that does not know it ends so.
        self.is_done = self.is_done or not self.is_resumable

    def _open(self, request: httpx.Request) -> httpx.Response:
        reply = self._client.send(request, stream=True)
        if reply.status_code != 200:
            with contextlib.closing(reply):
                raise MoemeshError(_sentence(reply))
        self.is_begun = True
        self.is_resumable = "moemesh-request-id" in reply.headers
        return reply


def _text_of(data: str) -> str:
    """Returns the text of an event. Raises MoemeshError with the server's sentence, or for what is not an event of a
    reply."""
    try:
        event = json.loads(data)
        error = event.get("error")
        choices = event["choices"] if error is None else ()
        text = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
        sentence = None if error is None else str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MoemeshError(f"no moemesh router answers there: its stream has an event {data[:100]!r}") from None
    if sentence is not None:
        raise MoemeshError(sentence)
    return text
