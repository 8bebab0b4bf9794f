"""What waits for the journal's disk, and who waits for that. In memory, safe in several threads; touches no disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from common.errors import FencedError, MoemeshError
from common.ids import RequestId, SequenceId
from services.router.engine import GeneratedToken
from services.router.journal.ledger import Ledger, LedgerRequest
from services.router.journal.records import AcceptedRequest, StepRecord


@dataclass(frozen=True, slots=True)
class WaitingStep:
    """One group commit."""

    number: int
    """Ascends."""
    record: StepRecord


@dataclass(frozen=True, slots=True, eq=False)
class WaitingRequest:
    """One that may begin once it is written."""

    request: LedgerRequest
    future: Future[None]


class JournalQueue:
    """`lock` is held for a moment only, and never while a disk is waited for."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self.wall_clock = wall_clock
        self.lock = threading.RLock()
        self.ledger = Ledger()
        self.backlog: deque[WaitingStep] = deque()
        """Steps that the disk has not taken, oldest first."""
        self.accepting: deque[WaitingRequest] = deque()
        self.flushes: list[Future[bool]] = []
        self.expired: set[int] = set()
        """Requests that are to be deleted with the next fold."""
        self.last_step = 0
        self.written_step = 0
        self.fenced: FencedError | None = None
        self._delivered_step = 0
        self._undelivered: deque[tuple[int, Callable[[], None]]] = deque()
        """(step, what hands it on)."""
        self._pending = StepRecord()
        """Goes with the next step."""

    def check_fenced(self) -> None:
        """Raises FencedError."""
        if self.fenced is not None:
            raise self.fenced

    # ---- what comes in

    def accept(self, accepted: AcceptedRequest, future: Future[None]) -> None:
        """See RequestJournal."""
        with self.lock:
            self.accepting.append(WaitingRequest(self.ledger.accept(accepted), future))

    def append(
        self, outcomes: Sequence[tuple[RequestId, GeneratedToken | MoemeshError]], then: Callable[[], None]
    ) -> None:
        """One step; `then` hands it on. One that brings nothing to be written goes with the step before it."""
        with self.lock:
            number = self.last_step + 1
            record, self._pending = self._pending, StepRecord()
            for request_id, outcome in outcomes:
                self._add_outcome(record, number, request_id, outcome)
            if record:
                self.last_step = number
                self.backlog.append(WaitingStep(number, record))
            self._undelivered.append((self.last_step, then))

    def note_placement(self, request_id: RequestId, sequence_id: SequenceId) -> None:
        """The choice has this number on the wire from now on."""
        with self.lock:
            found = self.ledger.open_choice(request_id)
            if found is not None:
                _, choice = found
                choice.sequence_id = sequence_id
                self._pending.placements.append((choice.number, sequence_id))

    def end(self, reply_id: str, is_kept: bool, error: MoemeshError | None) -> None:
        """See RequestJournal."""
        with self.lock:
            request = self.ledger.find(reply_id)
            if request is None or (is_kept and request.ended_s is not None):
                return
            ended_s = self.wall_clock()
            self._pending.ends.append((request.number, ended_s, is_kept))
            if error is not None and is_kept:
                request.choices[0].failure = error.code, error.message
                self._pending.failures.append((request.choices[0].number, error.code, error.message))
            self.ledger.end(request, ended_s, is_kept)

    def push_pending(self) -> None:
        """What waits for the next step becomes one."""
        with self.lock:
            record, self._pending = self._pending, StepRecord()
            if record:
                self.last_step += 1
                self.backlog.append(WaitingStep(self.last_step, record))

    def expire(self, before_s: float) -> None:
        """What ended before that is deleted with the next fold."""
        with self.lock:
            self.expired.update(request.number for request in self.ledger.expired(before_s))

    def receipt(self, reply_id: str) -> int:
        """See RequestJournal."""
        with self.lock:
            request = self.ledger.find(reply_id)
            # A later step of it may be under way to the disk; its client has nothing of that one.
            return 0 if request is None else min(request.last_step, self._delivered_step)

    def _add_outcome(
        self, record: StepRecord, number: int, request_id: RequestId, outcome: GeneratedToken | MoemeshError
    ) -> None:
        found = self.ledger.open_choice(request_id)
        if found is None:
            return
        request, choice = found
        request.last_step = number
        if isinstance(outcome, GeneratedToken):
            record.tokens.append((choice.number, choice.num_tokens, outcome))
            choice.num_tokens += 1
        else:
            choice.failure = outcome.code, outcome.message
            record.failures.append((choice.number, outcome.code, outcome.message))

    # ---- who waits

    def deliver(self, up_to: int) -> None:
        """Hand on the steps up to that one. Under the lock, since two threads may do so, and one order is promised."""
        with self.lock:
            while self._undelivered and self._undelivered[0][0] <= up_to:
                self._delivered_step, then = self._undelivered.popleft()
                then()

    def note_written(self, step: WaitingStep) -> bool:
        """It waits no longer. False if it was written another way before."""
        with self.lock:
            if not self.backlog or self.backlog[0] is not step:
                return False
            self.backlog.popleft()
            self.written_step = step.number
            return True

    def refuse_all(self, error: MoemeshError) -> None:
        """Nobody waits any longer."""
        with self.lock:
            while self.accepting:
                waiting = self.accepting.popleft()
                self.drop(waiting.request)
                settle(waiting.future, error)
            for flush in self.flushes:
                settle(flush, False)
            self.flushes.clear()

    def fence(self, error: FencedError) -> None:
        """Another router has the folder: nothing is handed on any more."""
        with self.lock:
            self.fenced = error
            self._undelivered.clear()
            self.refuse_all(error)

    def drop(self, request: LedgerRequest) -> None:
        """It was not begun; what may stand of it in the file is deleted with the next fold."""
        with self.lock:
            ended_s = self.wall_clock()
            self._pending.ends.append((request.number, ended_s, False))
            self.ledger.end(request, ended_s, is_kept=False)


def settle(future: Future[Any], outcome: object) -> None:
    """Give it a result or an exception, unless nobody waits for it any longer."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
