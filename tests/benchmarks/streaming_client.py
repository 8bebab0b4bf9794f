"""Streams completions over HTTP and notes when each token came, at as little cost as Python allows.

A plain socket, a reader for chunked bodies and `json.loads` of each event: a full-grown client library would take a
good part of one core at hundreds of tokens a second, and on a small machine that core is the server's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StreamTimes:
    """One stream; times in seconds on one clock."""

    sent_s: float
    arrivals: tuple[tuple[float, int], ...]
    """(when, how many tokens), in order."""

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)


@dataclass(frozen=True)
class Answer:
    """One stream with what it said."""

    times: StreamTimes
    token_ids: tuple[int, ...]
    """All that the server told; llama.cpp tells none of those whose text it holds back."""
    num_cached_tokens: int | None
    """Of the prompt, by the server's `usage`; None where it does not say."""


@dataclass(frozen=True)
class TimedRound:
    """Streams that were sent together."""

    streams: tuple[StreamTimes, ...]
    client_cpu_s: float


async def run_round(host: str, port: int, bodies: Sequence[dict[str, Any]]) -> TimedRound:
    """Sends all bodies at once to /v1/completions, and waits until every stream has ended.

    Raises RuntimeError with the server's words if it refuses one or breaks off.
    """
    cpu_s = time.process_time()
    answers = await asyncio.gather(*(ask(host, port, body) for body in bodies))
    return TimedRound(tuple(answer.times for answer in answers), time.process_time() - cpu_s)


async def run_clients(host: str, port: int, bodies_by_client: Sequence[Sequence[dict[str, Any]]]) -> TimedRound:
    """Clients side by side, each of which sends its next body when its last answer has ended; otherwise `run_round`."""
    cpu_s = time.process_time()
    streams = await asyncio.gather(*(_one_by_one(host, port, bodies) for bodies in bodies_by_client))
    return TimedRound(tuple(itertools.chain.from_iterable(streams)), time.process_time() - cpu_s)


async def _one_by_one(host: str, port: int, bodies: Sequence[dict[str, Any]]) -> list[StreamTimes]:
    return [(await ask(host, port, body)).times for body in bodies]


async def ask(host: str, port: int, body: dict[str, Any]) -> Answer:
    """Sends one body to /v1/completions, and waits until its stream has ended. Raises RuntimeError as `run_round`."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        payload = json.dumps(body | {"stream": True, "return_token_ids": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
        )
        sent_s = time.perf_counter()
        writer.write(head.encode() + payload)
        await _check_head(reader)
        arrivals: list[tuple[float, int]] = []
        token_ids: list[int] = []
        num_cached_tokens = None
        async for event in _events(reader):
            if event == b"[DONE]":
                return Answer(StreamTimes(sent_s, tuple(arrivals)), tuple(token_ids), num_cached_tokens)
            now_s = time.perf_counter()
            message = json.loads(event)
            if "error" in message:
                raise RuntimeError(f"the stream ended with an error: {message['error']}")
            num_tokens = count_new_tokens(message, sum(count for _, count in arrivals))
            if num_tokens:
                arrivals.append((now_s, num_tokens))
            token_ids += new_token_ids(message)
            if usage := message.get("usage"):
                num_cached_tokens = cached_tokens_of(usage)
        raise RuntimeError("the stream broke off before [DONE]")
    finally:
        writer.close()


def count_new_tokens(message: Mapping[str, Any], num_before: int) -> int:
    """Returns how many tokens an event brings.

    llama.cpp, asked for `timings_per_token`, tells how many there are so far: it holds text back until that is whole
    UTF-8, so that an event may stand for several tokens. Others send the ids.
    """
    if timings := message.get("timings"):
        return int(timings["predicted_n"]) - num_before
    return len(new_token_ids(message))


def new_token_ids(message: Mapping[str, Any]) -> list[int]:
    """Returns the ids that an event brings. llama.cpp, asked for `verbose`, tells them in a field of its own."""
    if verbose := message.get("__verbose"):
        return list(verbose["tokens"])
    return [token_id for choice in message.get("choices") or () for token_id in choice.get("token_ids") or ()]


def cached_tokens_of(usage: Mapping[str, Any]) -> int | None:
    """Returns how many tokens of the prompt were found in a cache, None if the server does not say."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return None if cached is None else int(cached)


async def _check_head(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status = head.split(" ", 2)[1]
    if status != "200":
        raise RuntimeError(f"HTTP {status}: {(await reader.read(2000)).decode(errors='replace')}")
    if "transfer-encoding: chunked" not in head.lower():
        raise RuntimeError(f"the answer is no stream:\n{head}")


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Data of server-sent events; comments, which keep proxies awake, are left out."""
    pending = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pending += (await reader.readexactly(size + 2))[:size]
        *complete, pending = pending.split(b"\n\n")
        for event in complete:
            if event.startswith(b"data: "):
                yield event[6:]
