"""What must outlive the router: each accepted request, its seed, its tokens, and how it ended.

Journal first, then send: the mesh thread hands in the tokens of a step before the front gets them, so that no client
has seen a token that a restarted router does not know. If the disk takes nothing, running requests go on: their steps
wait in memory, in order, and are written as soon as there is room; new requests are refused meanwhile.
"""

from __future__ import annotations

import heapq
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from common.errors import JournalError, MoemeshError
from common.ids import RequestId, SequenceId
from services.router.engine import GeneratedToken
from services.router.journal_records import (
    MAX_CHOICES,
    AcceptedRequest,
    JournalledRequest,
    StepRecord,
    encode_step,
)
from services.router.journal_store import UNREADABLE, FoldBuffer, JournalStore, damaged, open_store

FOLD_INTERVAL_S = 1.0
RETRY_INTERVAL_S = 0.5
"""Between two attempts to write while the disk takes nothing."""


@dataclass(slots=True)
class JournalCounts:
    """Since the start of the router."""

    commits: int = 0
    commit_s: float = 0.0
    failed_commits: int = 0
    is_writing: bool = True
    """False: the last commit failed."""
    steps_unwritten: int = 0
    restored_requests: int = 0


@dataclass(slots=True)
class _OpenChoice:
    number: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class JournalSettings:
    """How much is kept, and how safely."""

    is_synchronous: bool
    """Every commit waits for the disk."""
    retention_s: float
    """Requests that may be asked for after their end stay for so long."""


class Journal:
    """Open with `open_journal`. Safe in several threads; `append` and `tick` belong to the mesh thread."""

    def __init__(
        self,
        store: JournalStore,
        settings: JournalSettings,
        check_term: Callable[[], None],
        log: structlog.stdlib.BoundLogger,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`check_term` raises FencedError once another router has the state folder; asked at each commit."""
        self._store = store
        self._settings = settings
        self._check_term = check_term
        self._log = log
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._requests: dict[str, tuple[int, tuple[RequestId, ...]]] = {}
        self._choices: dict[RequestId, _OpenChoice] = {}
        self._kept: list[tuple[float, int, str]] = []
        """(ended, request, its reply id), a heap."""
        self._kept_numbers: dict[str, int] = {}
        """Of the requests in it, but for those that were forgotten before their time."""
        self._last_number = 0
        self._pending = StepRecord()
        """Goes with the next commit."""
        self._backlog: list[tuple[StepRecord, bytes]] = []
        """Steps that the disk has not taken, oldest first."""
        self._in_log = FoldBuffer()
        self._retry_at_s = 0.0
        self._next_fold_s = 0.0
        self._counts = JournalCounts()

    # ---- what the front and the mesh thread write

    def accept(self, accepted: AcceptedRequest) -> None:
        """See RequestJournal."""
        with self._lock:
            self._check_term()
            self._write_backlog(self._clock())
            if self._backlog:
                raise JournalError("the journal cannot be written to (is the disk full?); try again later")
            number = self._last_number + 1
            if not self._commit(lambda: self._store.insert_request(number, accepted)):
                raise JournalError("the journal cannot be written to (is the disk full?); try again later")
            self._last_number = number
            self._track(number, accepted, [0] * len(accepted.choice_ids))

    def append(self, outcomes: Sequence[tuple[RequestId, GeneratedToken | MoemeshError]]) -> None:
        """The outcomes of a step, before anybody else gets them. Raises FencedError.

        What the disk does not take is kept in memory, and `is_durable` is False until it does.
        """
        with self._lock:
            self._check_term()
            record, self._pending = self._pending, StepRecord()
            for request_id, outcome in outcomes:
                choice = self._choices.get(request_id)
                if choice is None:
                    continue
                if isinstance(outcome, GeneratedToken):
                    record.tokens.append((choice.number, choice.num_tokens, outcome))
                    choice.num_tokens += 1
                else:
                    record.failures.append((choice.number, outcome.code, outcome.message))
            self._write(record)

    def note_placement(self, request_id: RequestId, sequence_id: SequenceId) -> None:
        """The choice has this number on the wire from now on; written with the next commit."""
        with self._lock:
            choice = self._choices.get(request_id)
            if choice is not None:
                self._pending.placements.append((choice.number, sequence_id))

    def end(self, reply_id: str, is_kept: bool, error: MoemeshError | None = None) -> None:
        """See RequestJournal."""
        with self._lock:
            request = self._requests.pop(reply_id, None)
            ended_s = self._wall_clock()
            if request is None:
                kept_number = None if is_kept else self._kept_numbers.pop(reply_id, None)
                if kept_number is not None:
                    self._pending.ends.append((kept_number, ended_s, False))
                return
            number, choice_ids = request
            for choice_id in choice_ids:
                del self._choices[choice_id]
            self._pending.ends.append((number, ended_s, is_kept))
            if error is not None and is_kept:
                self._pending.failures.append((number * MAX_CHOICES, error.code, error.message))
            if is_kept:
                self._keep(ended_s, number, reply_id)

    def flush(self) -> bool:
        """See RequestJournal."""
        with self._lock:
            record, self._pending = self._pending, StepRecord()
            self._write(record)
            if self._backlog:
                self._write_backlog(self._clock())
            return not self._backlog

    def tick(self) -> None:
        """Call often: folds the log, deletes what is over, tries again what failed. Raises FencedError."""
        now_s = self._clock()
        if now_s < self._next_fold_s:
            return
        self._next_fold_s = now_s + FOLD_INTERVAL_S
        self.flush()
        with self._lock:
            expired = self._expired()
            if self._backlog or not (self._in_log or expired):
                return
            numbers = [number for _, number, _ in expired]
            if self._commit(lambda: self._store.fold(self._in_log, numbers)):
                self._in_log = FoldBuffer()
                for _, _, reply_id in expired:
                    self._kept_numbers.pop(reply_id, None)
            else:
                for entry in expired:
                    heapq.heappush(self._kept, entry)

    # ---- what is read

    @property
    def is_durable(self) -> bool:
        """See RequestJournal."""
        return not self._backlog

    def counts(self) -> JournalCounts:
        """A copy."""
        return replace(self._counts, steps_unwritten=len(self._backlog))

    def restore(self) -> list[JournalledRequest]:
        """Once, at the start: every request of the journal by acceptance; those that have not ended are open again.

        Raises ValueError if the file is damaged.
        """
        with self._lock:
            requests, self._in_log = self._store.read()
            self._last_number = max([0, *requests, *self._in_log.ends])
            for number, request in requests.items():
                if request.ended_s is None:
                    self._track(number, request.accepted, [len(choice.tokens) for choice in request.choices])
                    self._counts.restored_requests += 1
                else:
                    self._keep(request.ended_s, number, request.accepted.reply_id)
            expired = {number for _, number, _ in self._expired(is_taken=False)}
            return [request for number, request in requests.items() if number not in expired]

    def close(self) -> None:
        """Write what is left to be written, if the disk takes it. A router that was replaced writes nothing."""
        try:
            self.flush()
        except MoemeshError as error:
            self._log.warning("journal_not_flushed", reason=str(error))
        with self._lock:
            self._store.close()

    # ---- inside, under the lock

    def _track(self, number: int, accepted: AcceptedRequest, num_tokens: Sequence[int]) -> None:
        self._requests[accepted.reply_id] = number, accepted.choice_ids
        for index, (choice_id, count) in enumerate(zip(accepted.choice_ids, num_tokens, strict=True)):
            self._choices[choice_id] = _OpenChoice(number * MAX_CHOICES + index, count)

    def _keep(self, ended_s: float, number: int, reply_id: str) -> None:
        heapq.heappush(self._kept, (ended_s, number, reply_id))
        self._kept_numbers[reply_id] = number

    def _write(self, record: StepRecord) -> None:
        if record:
            self._backlog.append((record, encode_step(record)))
            if self._counts.is_writing or self._clock() >= self._retry_at_s:
                self._write_backlog(self._clock())

    def _write_backlog(self, now_s: float) -> None:
        if not self._backlog:
            return
        self._check_term()
        steps = [data for _, data in self._backlog]
        if self._commit(lambda: self._store.append_steps(steps)):
            for record, _ in self._backlog:
                self._in_log.add(record)
            self._backlog.clear()
        else:
            self._retry_at_s = now_s + RETRY_INTERVAL_S

    def _commit(self, write: Callable[[], None]) -> bool:
        started_s = self._clock()
        counts = self._counts
        try:
            write()
        except sqlite3.Error as error:
            counts.failed_commits += 1
            if counts.is_writing:
                counts.is_writing = False
                self._log.error("journal_not_written", reason=str(error))
            return False
        counts.commits += 1
        counts.commit_s += self._clock() - started_s
        if not counts.is_writing:
            counts.is_writing = True
            self._log.info("journal_written_again")
        return True

    def _expired(self, is_taken: bool = True) -> list[tuple[float, int, str]]:
        before_s = self._wall_clock() - self._settings.retention_s
        if not is_taken:
            return [entry for entry in self._kept if entry[0] < before_s]
        expired = []
        while self._kept and self._kept[0][0] < before_s:
            expired.append(heapq.heappop(self._kept))
        return expired


def open_journal(
    path: Path,
    model: str,
    settings: JournalSettings,
    check_term: Callable[[], None],
    log: structlog.stdlib.BoundLogger,
) -> tuple[Journal, list[JournalledRequest]]:
    """The journal, and what a router before this one left in it. `model`: see `open_store`.

    Raises ConfigurationError, which says what to do.
    """
    store = open_store(path, model, settings.is_synchronous)
    journal = Journal(store, settings, check_term, log)
    try:
        return journal, journal.restore()
    except (sqlite3.Error, *UNREADABLE) as error:
        store.close()
        raise damaged(path, error) from None
