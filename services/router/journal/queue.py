"""What waits for the journal's disk, what waits for that, and what the files hold. In memory; touches no disk.

The ledger has enough to write the files again if they are gone: requests that are under way, and ended ones that may
still be asked for, with their tokens as packed runs, as they lie in the file. What a step brought since the last
compaction is not in it but with the journal's writer, which adds it.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from common.errors import FencedError, MoemeshError
from common.ids import RequestId, SequenceId
from services.router.engine import Token
from services.router.journal.records import MAX_CHOICES, AcceptedRequest, JournalledRequest, StepRecord


@dataclass(slots=True, eq=False)
class LedgerChoice:
    """One choice of a request."""

    number: int
    """Its number in the journal."""
    num_tokens: int = 0
    """All its tokens, with those that no run has yet."""
    runs: list[tuple[int, bytes]] = field(default_factory=list)
    """(position of the first, packed tokens)."""
    sequence_id: SequenceId | None = None
    failure: tuple[str, str] | None = None
    """(error code, sentence)."""


@dataclass(slots=True, eq=False)
class LedgerRequest:
    """One request that the files hold."""

    number: int
    accepted: AcceptedRequest
    choices: tuple[LedgerChoice, ...]
    ended_s: float | None = None
    """The wall clock at its end; None while it is under way."""
    last_step: int = 0
    """The newest step that brought something of it."""


class Ledger:
    """Knows what the files hold. It is not safe in several threads: its owner has a lock."""

    def __init__(self) -> None:
        self.requests: dict[str, LedgerRequest] = {}
        """Requests by reply id, in the order of acceptance."""
        self.open_choices: dict[RequestId, tuple[LedgerRequest, LedgerChoice]] = {}
        """Choices of requests that have not ended, with these."""
        self._choices: dict[int, LedgerChoice] = {}
        self._ends: list[tuple[float, str]] = []
        """(ended, reply id) of kept requests, a heap; of some the request was deleted since."""
        self.last_number = 0

    def accept(self, accepted: AcceptedRequest) -> LedgerRequest:
        """Enters the request, which gets the next number."""
        self.last_number += 1
        choices = tuple(
            LedgerChoice(self.last_number * MAX_CHOICES + index) for index in range(len(accepted.choice_ids))
        )
        return self._enter(LedgerRequest(self.last_number, accepted, choices))

    def restore(self, request: JournalledRequest) -> None:
        """Enters the request as the file has it."""
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

    def add_run(self, number: int, first: int, data: bytes) -> None:
        """Adds tokens of a choice that were moved out of the log of the file."""
        choice = self._choices.get(number)
        if choice is not None:
            choice.runs.append((first, data))

    def end(self, request: LedgerRequest, ended_s: float, is_kept: bool) -> None:
        """Hears that nothing more comes for the request."""
        if not is_kept:
            self._remove(request)
            return
        request.ended_s = ended_s
        self._close(request)
        heapq.heappush(self._ends, (ended_s, request.accepted.reply_id))

    def expired(self, before_s: float) -> list[LedgerRequest]:
        """Removes and returns kept requests that ended before that."""
        expired = []
        while self._ends and self._ends[0][0] < before_s:
            request = self.requests.get(heapq.heappop(self._ends)[1])
            if request is not None:
                expired.append(request)
                self._remove(request)
        return expired

    def _enter(self, request: LedgerRequest) -> LedgerRequest:
        self.requests[request.accepted.reply_id] = request
        self._choices.update((choice.number, choice) for choice in request.choices)
        if request.ended_s is None:
            for choice_id, choice in zip(request.accepted.choice_ids, request.choices, strict=True):
                self.open_choices[choice_id] = request, choice
        else:
            heapq.heappush(self._ends, (request.ended_s, request.accepted.reply_id))
        return request

    def _remove(self, request: LedgerRequest) -> None:
        self._close(request)
        self.requests.pop(request.accepted.reply_id, None)
        for choice in request.choices:
            self._choices.pop(choice.number, None)

    def _close(self, request: LedgerRequest) -> None:
        for choice_id in request.accepted.choice_ids:
            self.open_choices.pop(choice_id, None)


class JournalQueue:
    """Holds what waits. `lock` is held for a moment only, and never while a disk is waited for."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self.wall_clock = wall_clock
        self.lock = threading.RLock()
        self.ledger = Ledger()
        self.backlog: deque[StepRecord] = deque()
        """Steps that the disk has not taken, oldest first."""
        self.accepting: dict[LedgerRequest, Future[None]] = {}
        """Requests that may begin once they are written, with what is done then."""
        self.flushes: list[Future[bool]] = []
        self.expired: set[int] = set()
        """Requests that are to be deleted with the next compaction."""
        self.last_step = 0
        self.written_step = 0
        self.fenced: FencedError | None = None
        self._delivered_step = 0
        self._undelivered: deque[tuple[int, Callable[[], None]]] = deque()
        """(step, what hands it on)."""
        self._pending = StepRecord()
        """It goes with the next step."""

    def check_fenced(self) -> None:
        """Raises FencedError."""
        if self.fenced is not None:
            raise self.fenced

    # ---- what comes in

    def append(self, outcomes: Sequence[tuple[RequestId, Token | MoemeshError]], then: Callable[[], None]) -> None:
        """Adds one step; `then` hands it on. One that brings nothing to be written goes with the step before it."""
        with self.lock:
            for request_id, outcome in outcomes:
                self._add_outcome(request_id, outcome)
            self.push_pending()
            self._undelivered.append((self.last_step, then))

    def note_placement(self, request_id: RequestId, sequence_id: SequenceId) -> None:
        """Notes that the choice has this number on the wire from now on."""
        with self.lock:
            found = self.ledger.open_choices.get(request_id)
            if found is not None:
                _, choice = found
                choice.sequence_id = sequence_id
                self._pending.placements.append((choice.number, sequence_id))

    def end(self, reply_id: str, is_kept: bool, error: MoemeshError | None = None) -> None:
        """See RequestJournal. What stands of it in the file, if not kept, is deleted with the next compaction."""
        with self.lock:
            request = self.ledger.requests.get(reply_id)
            if request is None or (is_kept and request.ended_s is not None):
                return
            ended_s = self.wall_clock()
            self._pending.ends.append((request.number, ended_s, is_kept))
            if error is not None and is_kept:
                request.choices[0].failure = error.code, error.message
                self._pending.failures.append((request.choices[0].number, error.code, error.message))
            self.ledger.end(request, ended_s, is_kept)

    def push_pending(self) -> None:
        """Makes a step of what waits for the next one."""
        with self.lock:
            if self._pending:
                self.last_step += 1
                self._pending.number = self.last_step
                self.backlog.append(self._pending)
                self._pending = StepRecord()

    def expire(self, before_s: float) -> None:
        """Lets the next compaction delete what ended before that."""
        with self.lock:
            self.expired.update(request.number for request in self.ledger.expired(before_s))

    def receipt(self, reply_id: str) -> int:
        """See RequestJournal."""
        with self.lock:
            request = self.ledger.requests.get(reply_id)
            # A later step of it may be under way to the disk; its client has nothing of that one.
            return 0 if request is None else min(request.last_step, self._delivered_step)

    def _add_outcome(self, request_id: RequestId, outcome: Token | MoemeshError) -> None:
        found = self.ledger.open_choices.get(request_id)
        if found is None:
            return
        request, choice = found
        request.last_step = self.last_step + 1
        if isinstance(outcome, Token):
            self._pending.tokens.append((choice.number, choice.num_tokens, outcome))
            choice.num_tokens += 1
        else:
            choice.failure = outcome.code, outcome.message
            self._pending.failures.append((choice.number, outcome.code, outcome.message))

    # ---- what waits

    def deliver(self, up_to: int) -> None:
        """Hands on the steps up to that one: under the lock, since two threads may do so, and one order is promised."""
        with self.lock:
            while self._undelivered and self._undelivered[0][0] <= up_to:
                self._delivered_step, then = self._undelivered.popleft()
                then()

    def note_written(self, step: StepRecord) -> bool:
        """Removes the step from those that wait. Returns False if it was written another way before."""
        with self.lock:
            if not self.backlog or self.backlog[0] is not step:
                return False
            self.backlog.popleft()
            self.written_step = step.number
            return True

    def refuse_all(self, error: MoemeshError) -> None:
        """Tells all that wait that it was not written."""
        with self.lock:
            accepting, self.accepting = self.accepting, {}
            for request, future in accepting.items():
                self.end(request.accepted.reply_id, is_kept=False)
                settle(future, error)
            for flush in self.flushes:
                settle(flush, False)
            self.flushes.clear()

    def fence(self, error: FencedError) -> None:
        """Hears that another router has the folder: nothing is handed on any more."""
        with self.lock:
            self.fenced = error
            self._undelivered.clear()
            self.refuse_all(error)


def settle(future: Future[Any], outcome: object) -> None:
    """Gives the future a result or an exception, unless nothing waits for it any longer."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
