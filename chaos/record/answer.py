"""One answer as its client puts it together from chunks, over as many connections as it takes. No I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chaos.record.history import ChoiceFinished, Ended, Event, Failed, Tokens, logprob_bits
from chaos.record.sse import ServerEvent

DONE = "[DONE]"


@dataclass(slots=True)
class Answer:
    """`take` events in order; what they say goes into the record. Offsets count what this client has got."""

    operation: str
    num_choices: int
    record: Callable[[Event], None]
    clock: Callable[[], float]
    last_event_id: str = ""
    """Of the last event that was taken: where a new connection goes on."""
    is_over: bool = False
    _counts: list[int] = field(default_factory=list)
    _texts: list[Any] = field(default_factory=list)
    _finished: set[int] = field(default_factory=set)
    _usage: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._counts = [0] * self.num_choices
        self._texts = [hashlib.sha256() for _ in range(self.num_choices)]

    @property
    def has_begun(self) -> bool:
        return any(self._counts)

    def take(self, event: ServerEvent) -> None:
        """A chunk, an error, or the end."""
        if self.is_over:
            return
        if event.data == DONE:
            self._end()
        else:
            self._take_chunk(json.loads(event.data))
        self.last_event_id = event.event_id

    def fail(self, code: str, message: str, status: int = 0) -> None:
        """The end of it, without the rest."""
        self.is_over = True
        self.record(Failed(self.clock(), self.operation, code, message, status))

    def _take_chunk(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            error = chunk["error"]
            self.fail(str(error.get("code") or error.get("type")), str(error.get("message")))
            return
        self._usage |= chunk.get("usage") or {}
        for name in chunk.keys() & {"moemesh"}:
            self._usage[name] = chunk[name]
        for choice in chunk.get("choices", ()):
            self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        index = int(choice["index"])
        token_ids = tuple(choice.get("token_ids") or ())
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
        self._texts[index].update((choice.get("text") or "").encode())
        if token_ids:
            bits = tuple(logprob_bits(float(value)) for value in logprobs)
            self.record(Tokens(self.clock(), self.operation, index, self._counts[index], token_ids, bits))
            self._counts[index] += len(token_ids)
        if choice.get("finish_reason"):
            self._finished.add(index)
            text = self._texts[index].hexdigest()
            self.record(ChoiceFinished(self.clock(), self.operation, index, choice["finish_reason"], text))

    def _end(self) -> None:
        if len(self._finished) < self.num_choices:
            self.fail("ended_early", f"[DONE], and {self.num_choices - len(self._finished)} choices have no end")
            return
        self.is_over = True
        self.record(Ended(self.clock(), self.operation, self._usage))
