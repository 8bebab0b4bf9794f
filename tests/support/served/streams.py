"""Streams that note when something came, and how they ended: what a fault must not turn into silence."""

from __future__ import annotations

import itertools
import json
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

from chaos.record.sse import split_lines
from tests.support.served.mesh_client import Ask


@dataclass
class Stream:
    """One streamed completion; fields grow while it runs."""

    ask: Ask
    token_ids: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    """What the server said: an error event, or the body of an error status."""
    broke_off: str = ""
    """Why there was neither an end nor an error."""
    ended_s: float = 0.0

    def longest_silence_s(self, since_s: float) -> float:
        """The longest time without a token after `since_s`, until the end of the stream."""
        moments = [since_s, *(at_s for at_s in self.arrivals_s if at_s > since_s), max(self.ended_s, since_s)]
        return max(later - earlier for earlier, later in itertools.pairwise(moments))


class RunningStreams:
    """Starts all on entering, and waits for all on leaving."""

    def __init__(self, url: str, model: str, asks: list[Ask]) -> None:
        self._url = url
        self._model = model
        self.streams = [Stream(ask) for ask in asks]
        self._threads = [threading.Thread(target=self._run, args=(stream,)) for stream in self.streams]

    def __enter__(self) -> RunningStreams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.join()

    @property
    def all_have_tokens(self) -> bool:
        """Whether each stream has got something, or has ended."""
        return all(stream.token_ids or stream.ended_s for stream in self.streams)

    def _run(self, stream: Stream) -> None:
        try:
            self._read(stream)
        except httpx.HTTPError as error:
            stream.broke_off = f"{type(error).__name__}: {error}"
        finally:
            stream.ended_s = time.monotonic()

    def _read(self, stream: Stream) -> None:
        body = stream.ask.body(self._model) | {"stream": True}
        with httpx.Client(timeout=60, trust_env=False) as http:
            with http.stream("POST", self._url + "/v1/completions", json=body) as response:
                if response.is_error:
                    stream.error = json.loads(response.read())["error"]
                    return
                for line in split_lines(response.iter_bytes()):
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        _take(stream, json.loads(line.removeprefix("data: ")))
                if stream.error is None:
                    stream.broke_off = "no [DONE]"


def _take(stream: Stream, message: dict[str, Any]) -> None:
    if "error" in message:
        stream.error = message["error"]
        return
    for choice in message["choices"]:
        stream.token_ids += choice.get("token_ids") or ()
        stream.finish_reason = choice["finish_reason"] or stream.finish_reason
        stream.arrivals_s.append(time.monotonic())
