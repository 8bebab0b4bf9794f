"""The journal's half that touches the disk, and waits for it. All of it runs in the disk's thread."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from common.errors import ConfigurationError, FencedError, JournalError
from services.router.journal.files import LostFilesError
from services.router.journal.queue import JournalQueue, WaitingRequest, WaitingStep, settle
from services.router.journal.records import JournalledRequest, encode_step
from services.router.journal.store import FoldBuffer, JournalStore, Run

NOT_TAKEN = "the journal cannot be written to (is the disk full?); try again later"


@dataclass(slots=True)
class WriterCounts:
    """Since the start of the router."""

    commits: int = 0
    commit_s: float = 0.0
    failed_commits: int = 0
    is_writing: bool = True
    """False: the last commit failed."""
    rewrites: int = 0
    """Times that the files were gone and were written anew."""


class JournalWriter:
    """Takes from the queue what waits, and settles with whoever waits for it."""

    def __init__(
        self,
        store: JournalStore,
        queue: JournalQueue,
        check_term: Callable[[], None],
        log: structlog.stdlib.BoundLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`check_term` raises FencedError once another router has the state folder; asked before each commit."""
        self._store = store
        self._queue = queue
        self._check_term = check_term
        self._log = log
        self._clock = clock
        self._in_log = FoldBuffer()
        self.failed_s = float("-inf")
        """When the disk took steps last time not."""
        self.is_lost = False
        """The files are gone, and could not be written anew yet."""
        self.counts = WriterCounts()

    def restore(self) -> dict[int, JournalledRequest]:
        """Once, at the start, in any thread. Raises ValueError and sqlite3.Error."""
        requests, self._in_log = self._store.read()
        self._queue.ledger.last_number = max([0, *requests, *self._in_log.ends])
        for request in requests.values():
            self._queue.ledger.restore(request)
        return requests

    def work(self, is_fold_due: bool) -> None:
        """Everything that waits to be written. Raises FencedError."""
        queue = self._queue
        with queue.lock:
            accepting, flushes = list(queue.accepting), list(queue.flushes)
        try:
            self._check_term()
        except FencedError as error:
            queue.fence(error)
            raise
        is_written = self._write_backlog()
        for waiting in accepting:
            self._write_request(waiting, is_written)
        if is_fold_due and is_written:
            self._fold()
        with queue.lock:
            for flush in flushes:
                if flush in queue.flushes:
                    queue.flushes.remove(flush)
                    settle(flush, is_written)

    def close(self) -> None:
        """Write what is left, and fold the WAL into the file. A router that was replaced writes nothing."""
        try:
            self._queue.check_fenced()
            self._check_term()
            self._write_backlog()
            self._write(lambda: None)  # looks whether the files are there
        except FencedError as error:
            self._log.warning("journal_not_flushed", reason=error.message)
        try:
            self._store.close()
        except sqlite3.Error as error:
            self._log.warning("journal_not_closed", reason=str(error))

    def _write_backlog(self) -> bool:
        with self._queue.lock:
            steps, newest = list(self._queue.backlog), self._queue.last_step
        is_written = True
        if steps:
            encoded = [encode_step(step.record) for step in steps]
            is_written = self._commit(lambda: self._store.append_steps(encoded), steps)
        if not is_written:
            self.failed_s = self._clock()
        self._queue.deliver(newest)
        return is_written

    def _write_request(self, waiting: WaitingRequest, may_be_taken: bool) -> None:
        queue, request = self._queue, waiting.request
        with queue.lock:
            is_wanted = queue.ledger.find(request.accepted.reply_id) is request
            if not is_wanted and waiting in queue.accepting:
                queue.accepting.remove(waiting)
        if not is_wanted:  # its client is gone, or was refused since the disk did not answer
            return
        is_taken = may_be_taken and self._commit(lambda: self._store.insert_request(request.number, request.accepted))
        with queue.lock:
            if waiting not in queue.accepting:
                return
            queue.accepting.remove(waiting)
            if not is_taken:
                queue.drop(request)
            settle(waiting.future, None if is_taken else JournalError(NOT_TAKEN))

    def _fold(self) -> None:
        with self._queue.lock:
            expired = list(self._queue.expired)
        if not (self._in_log or expired):
            self._write(lambda: None)  # looks whether the files are there
            return
        runs: list[Run] = []
        if self._commit(lambda: runs.extend(self._store.fold(self._in_log, expired))):
            self._in_log = FoldBuffer()
            with self._queue.lock:
                self._queue.expired.difference_update(expired)
            self._keep_runs(runs)

    def _commit(self, write: Callable[[], None], steps: Sequence[WaitingStep] = ()) -> bool:
        """`steps`: what `write` brings into the log, and which waits no longer then."""
        started_s = self._clock()
        if not self._write(write):
            return False
        self.counts.commits += 1
        self.counts.commit_s += self._clock() - started_s
        for step in steps:
            if self._queue.note_written(step):  # else the files were written anew, and have it
                self._in_log.add(step.record)
        return True

    def _write(self, write: Callable[[], None]) -> bool:
        """False if the disk does not take it. Where the files are gone, they are written anew, and all is in them."""
        counts = self.counts
        try:
            try:
                if self.is_lost or not self._store.is_in_place():
                    raise LostFilesError
                write()
            except LostFilesError:
                self._write_anew()
        except (sqlite3.Error, OSError, ConfigurationError) as error:
            counts.failed_commits += 1
            if counts.is_writing:
                counts.is_writing = False
                self._log.error("journal_not_written", reason=str(error))
            return False
        if not counts.is_writing:
            counts.is_writing = True
            self._log.info("journal_written_again")
        return True

    def _write_anew(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            self._log.error("journal_gone", detail="its files were removed or changed by somebody else")
        with self._queue.lock:
            requests, steps = self._queue.ledger.requests(), list(self._queue.backlog)
        buffer = self._in_log.copy()
        for step in steps:
            buffer.add(step.record)
        runs = self._store.write_anew(requests, buffer)
        self._in_log = FoldBuffer()
        self._keep_runs(runs)
        for step in steps:
            self._queue.note_written(step)
        self.is_lost = False
        self.counts.rewrites += 1
        self._log.info("journal_written_anew", requests=len(requests))

    def _keep_runs(self, runs: Sequence[Run]) -> None:
        with self._queue.lock:
            for choice, first, data in runs:
                self._queue.ledger.add_run(choice, first, data)
