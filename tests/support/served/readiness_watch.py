"""Asks /ready again and again beside a test, and keeps when each answer changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import httpx

ASK_EVERY_S = 0.02


@dataclass(frozen=True, slots=True)
class Turn:
    """From `at_s` on, /ready said this."""

    at_s: float
    ready: bool
    said: str


@dataclass
class ReadinessWatch:
    """A context manager around a thread that polls. No answer within `timeout_s` counts as not ready."""

    url: str
    timeout_s: float = 1.0
    turns: list[Turn] = field(default_factory=list)
    _ending: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._poll, name="readiness", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        assert self._thread is not None
        self._thread.join()

    def seconds_until(self, ready: bool, since_s: float, within_s: float, clock: Callable[[], float]) -> float:
        """How long after `since_s` /ready first said so. AssertionError if it did not within `within_s`."""
        while clock() < since_s + within_s:
            for turn in list(self.turns):
                if turn.at_s >= since_s and turn.ready is ready:
                    return turn.at_s - since_s
            self._ending.wait(ASK_EVERY_S)
        raise AssertionError(f"/ready did not turn {ready} within {within_s} s: {self.turns[-3:]}")

    def _poll(self) -> None:
        with httpx.Client(timeout=self.timeout_s, trust_env=False) as client:
            while not self._ending.wait(ASK_EVERY_S):
                try:
                    reply = client.get(f"{self.url}/ready")
                    ready, said = reply.status_code == 200, reply.text
                except httpx.HTTPError as error:
                    ready, said = False, repr(error)
                if not self.turns or self.turns[-1].ready is not ready:
                    self.turns.append(Turn(time.monotonic(), ready, said))
