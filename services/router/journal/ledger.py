"""What the journal's files hold, in memory: enough to write them anew if they are gone. Pure.

Requests that are under way, and ended ones that may still be asked for; their tokens as packed runs, as they lie in the
file. What a step brought since the last fold is not here but with the journal, which adds it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from common.ids import RequestId, SequenceId
from services.router.journal.records import MAX_CHOICES, AcceptedRequest, JournalledRequest


@dataclass(slots=True, eq=False)
class LedgerChoice:
    """One choice."""

    number: int
    """In the journal."""
    num_tokens: int = 0
    """With those that no run has yet."""
    runs: list[tuple[int, bytes]] = field(default_factory=list)
    """(position of the first, packed tokens)."""
    sequence_id: SequenceId | None = None
    failure: tuple[str, str] | None = None
    """(error code, sentence)."""


@dataclass(slots=True, eq=False)
class LedgerRequest:
    """One request."""

    number: int
    accepted: AcceptedRequest
    choices: tuple[LedgerChoice, ...]
    ended_s: float | None = None
    """Wall clock; None while it is under way."""
    last_step: int = 0
    """The newest step that brought something of it."""


class Ledger:
    """Not safe in several threads: whoever owns it has a lock."""

    def __init__(self) -> None:
        self._requests: dict[str, LedgerRequest] = {}
        self._open_choices: dict[RequestId, tuple[LedgerRequest, LedgerChoice]] = {}
        self._choices: dict[int, LedgerChoice] = {}
        self._ends: list[tuple[float, str]] = []
        """(ended, reply id) of kept requests, a heap; of some the request was deleted since."""
        self.last_number = 0

    def accept(self, accepted: AcceptedRequest) -> LedgerRequest:
        """It has the next number."""
        self.last_number += 1
        choices = tuple(
            LedgerChoice(self.last_number * MAX_CHOICES + index) for index in range(len(accepted.choice_ids))
        )
        return self._enter(LedgerRequest(self.last_number, accepted, choices))

    def restore(self, request: JournalledRequest) -> None:
        """As the file has it."""
        self.last_number = max(self.last_number, request.number)
        choices = tuple(
            LedgerChoice(
                request.number * MAX_CHOICES + index,
                choice.num_tokens,
                list(choice.runs),
                choice.sequence_id,
                None if choice.error is None else (choice.error.code, choice.error.message),
            )
            for index, choice in enumerate(request.choices)
        )
        self._enter(LedgerRequest(request.number, request.accepted, choices, request.ended_s))

    def find(self, reply_id: str) -> LedgerRequest | None:
        """None if it is not here, or was deleted."""
        return self._requests.get(reply_id)

    def open_choice(self, choice_id: RequestId) -> tuple[LedgerRequest, LedgerChoice] | None:
        """None if its request has ended."""
        return self._open_choices.get(choice_id)

    def add_run(self, number: int, first: int, data: bytes) -> None:
        """Tokens of a choice were folded into the file."""
        choice = self._choices.get(number)
        if choice is not None:
            choice.runs.append((first, data))

    def end(self, request: LedgerRequest, ended_s: float, is_kept: bool) -> None:
        """Nothing more comes for it."""
        if not is_kept:
            self._remove(request)
            return
        request.ended_s = ended_s
        self._close(request)
        heapq.heappush(self._ends, (ended_s, request.accepted.reply_id))

    def expired(self, before_s: float) -> list[LedgerRequest]:
        """Kept requests that ended before that, and are no longer kept."""
        expired = []
        while self._ends and self._ends[0][0] < before_s:
            request = self._requests.get(heapq.heappop(self._ends)[1])
            if request is not None:
                expired.append(request)
                self._remove(request)
        return expired

    def requests(self) -> list[LedgerRequest]:
        """All, by acceptance."""
        return sorted(self._requests.values(), key=lambda request: request.number)

    def _enter(self, request: LedgerRequest) -> LedgerRequest:
        self._requests[request.accepted.reply_id] = request
        self._choices.update((choice.number, choice) for choice in request.choices)
        if request.ended_s is None:
            for choice_id, choice in _by_id(request):
                self._open_choices[choice_id] = request, choice
        else:
            heapq.heappush(self._ends, (request.ended_s, request.accepted.reply_id))
        return request

    def _remove(self, request: LedgerRequest) -> None:
        self._close(request)
        self._requests.pop(request.accepted.reply_id, None)
        for choice in request.choices:
            self._choices.pop(choice.number, None)

    def _close(self, request: LedgerRequest) -> None:
        for choice_id in request.accepted.choice_ids:
            self._open_choices.pop(choice_id, None)


def _by_id(request: LedgerRequest) -> Iterable[tuple[RequestId, LedgerChoice]]:
    ids: Sequence[RequestId] = request.accepted.choice_ids
    return zip(ids, request.choices, strict=True)
