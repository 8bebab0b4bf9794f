"""A client that comes back: it streams, and when the line breaks it asks for the rest by its own request id."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

from chaos.record.sse import split_lines
from common.errors import NodeLostError

PATIENCE_S = 90


@dataclass
class ResumableStream:
    """One streamed request; fields grow while it runs."""

    name: str
    path: str
    body: dict[str, Any]
    choices: dict[int, list[Any]] = field(default_factory=dict)
    """By index: the choice of every chunk, as it came."""
    usage: dict[str, Any] | None = None
    last_event_id: str = ""
    num_attachments: int = 0
    is_done: bool = False
    errors: list[str] = field(default_factory=list)
    """Whatever was no part of an answer; empty after a good run."""

    @property
    def has_tokens(self) -> bool:
        return self.last_event_id != ""

    def take_line(self, line: str) -> None:
        """One line of server-sent events."""
        if line.startswith("id: "):
            self.last_event_id = line.removeprefix("id: ")
        elif line == "data: [DONE]":
            self.is_done = True
        elif line.startswith("data: "):
            payload = json.loads(line.removeprefix("data: "))
            if "error" in payload:
                self.errors.append(str(payload["error"]))
            self.usage = payload.get("usage") or self.usage
            for choice in payload.get("choices", ()):
                self.choices.setdefault(choice["index"], []).append(choice)


class RunningResumableStreams:
    """Starts all on entering, and waits for all on leaving. `url` may raise NodeLostError while the router is away."""

    def __init__(self, url: Callable[[], str], streams: Iterable[ResumableStream]) -> None:
        self._url = url
        self.streams = list(streams)
        self._threads = [threading.Thread(target=self._run, args=(stream,)) for stream in self.streams]

    def __enter__(self) -> RunningResumableStreams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.join()

    def _run(self, stream: ResumableStream) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not stream.is_done and not stream.errors:
            if time.monotonic() > deadline_s:
                stream.errors.append("it took too long")
                return
            try:
                self._attach(stream)
            except (httpx.HTTPError, NodeLostError):
                time.sleep(0.05)

    def _attach(self, stream: ResumableStream) -> None:
        with httpx.Client(base_url=self._url(), timeout=30, trust_env=False) as http:
            if not stream.num_attachments:
                headers = {"Moemesh-Resumable": "1", "X-Request-Id": stream.name}
                self._read(stream, http, "POST", stream.path, headers, stream.body)
            else:
                headers = {"Last-Event-ID": stream.last_event_id} if stream.last_event_id else {}
                self._read(stream, http, "GET", f"/v1/requests/{stream.name}/events", headers, None)

    def _read(
        self,
        stream: ResumableStream,
        http: httpx.Client,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: dict[str, Any] | None,
    ) -> None:
        with http.stream(method, path, headers=headers, json=body) as response:
            stream.num_attachments += 1
            if response.is_error:
                stream.errors.append(f"{response.status_code}: {response.read().decode()}")
                return
            for line in split_lines(response.iter_bytes()):
                stream.take_line(line)
