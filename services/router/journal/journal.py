"""What must outlive the router: each accepted request, its seed, its tokens, and how it ended.

Journal first, then send: the tokens of a step are handed on to the front once they are written, so that no client has
seen a token that a restarted router does not know. All that touches the disk happens in a thread of its own
(`JournalWriter`); a disk that takes nothing, or hangs for longer than STUCK_AFTER_S, stops nothing: running requests go
on, their steps wait in memory, in order (`queue.py`), and are written as soon as the disk takes them; new requests are
refused meanwhile.

What the files hold (`store.py`) is in memory, too (`Ledger`): files that are gone are written again.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from common.errors import ConfigurationError, FencedError, JournalError, MoemeshError
from common.ids import RequestId, SequenceId
from services.router.engine import Token
from services.router.journal.disk_thread import DiskThread
from services.router.journal.files import UNREADABLE, LostFilesError, damaged, open_database
from services.router.journal.queue import JournalQueue, LedgerRequest, settle
from services.router.journal.records import AcceptedRequest, JournalledRequest, RequestJournal, StepRecord, encode_step
from services.router.journal.store import JournalStore, Run

log = structlog.get_logger(__name__)

COMPACT_INTERVAL_S = 1.0
RETRY_INTERVAL_S = 0.5
"""How long to wait between two attempts to write while the disk takes nothing."""
STUCK_AFTER_S = 1.0
"""A disk that has not answered for this long is not waited for any longer: tokens are handed on, marked as not durable,
and new requests are refused, until it answers."""
NOT_WRITABLE = "the journal cannot be written to (is the disk full?); try again later"


@dataclass(slots=True)
class JournalCounts:
    """What the writer has counted since the start of the router."""

    commits: int = 0
    commit_s: float = 0.0
    failed_commits: int = 0
    is_writing: bool = True
    """False if the last commit failed."""
    rewrites: int = 0
    """How many times the files were gone and were written again."""
    restored_requests: int = 0


class Journal(RequestJournal, Collector):
    """Open it with `open_journal`. It is safe in several threads; `append` and `tick` belong to the mesh thread."""

    def __init__(
        self,
        queue: JournalQueue,
        writer: JournalWriter,
        retention_s: float,
        disk: DiskThread,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`writer` does its work in `disk`. Requests that may be asked for after their end stay for `retention_s`."""
        self._queue = queue
        self._writer = writer
        self._retention_s = retention_s
        self._disk = disk
        self._clock = clock
        self._is_scheduled = False
        self._is_stuck = False
        self._is_compaction_due = False
        self._next_compaction_s = 0.0
        self._next_word_s = STUCK_AFTER_S

    # ---- what the front and the mesh thread write

    def accept(self, accepted: AcceptedRequest) -> Future[None]:
        """See RequestJournal."""
        future: Future[None] = Future()
        with self._queue.lock:
            self._queue.check_fenced()
            if self._is_stuck:
                future.set_exception(JournalError(self.trouble() or NOT_WRITABLE))
                return future
            self._queue.accepting[self._queue.ledger.accept(accepted)] = future
        self._schedule()
        return future

    def append(
        self,
        outcomes: Sequence[tuple[RequestId, Token | MoemeshError]],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes the outcomes of a step. `then` hands them on: once they are written, or it is known that the disk does
        not take them or hangs; in the order of the steps, and in any thread. Raises FencedError; they are never handed
        on then.

        What the disk does not take is kept in memory, and `has_written` says so until it does.
        """
        queue = self._queue
        with queue.lock:
            queue.check_fenced()
            queue.append(outcomes, then)
            may_be_written = self._writer.counts.is_writing or self._clock() - self._writer.failed_s >= RETRY_INTERVAL_S
            if queue.backlog and may_be_written and not self._is_stuck:
                self._schedule()
            else:
                queue.deliver(queue.last_step)

    def note_placement(self, request_id: RequestId, sequence_id: SequenceId) -> None:
        """Notes that the choice has this number on the wire from now on; it is written with the next commit."""
        self._queue.note_placement(request_id, sequence_id)

    def end(self, reply_id: str, is_kept: bool, error: MoemeshError | None = None) -> None:
        """See RequestJournal."""
        self._queue.end(reply_id, is_kept, error)

    def receipt(self, reply_id: str) -> int:
        """See RequestJournal."""
        return self._queue.receipt(reply_id)

    def has_written(self, receipt: int) -> bool:
        """See RequestJournal."""
        return receipt <= self._queue.written_step and not self._writer.is_lost

    def flush(self) -> Future[bool]:
        """See RequestJournal."""
        future: Future[bool] = Future()
        with self._queue.lock:
            self._queue.check_fenced()
            if self._is_stuck:
                future.set_result(False)
                return future
            self._queue.push_pending()
            self._queue.flushes.append(future)
        self._schedule()
        return future

    def tick(self) -> None:
        """Compacts the log, deletes what is over, tries again what failed, and goes on without a disk that hangs; to be
        called often. Raises FencedError."""
        self._watch()
        now_s = self._clock()
        if now_s < self._next_compaction_s:
            return
        self._next_compaction_s = now_s + COMPACT_INTERVAL_S
        self._queue.push_pending()
        self._queue.expire(self._queue.wall_clock() - self._retention_s)
        self._is_compaction_due = True
        self._schedule()

    # ---- what is read

    def trouble(self) -> str | None:
        """See RequestJournal."""
        if self._is_stuck:
            return (
                f"the disk under STATE_DIR has not answered for {self._disk.busy_s:.0f} s: new requests are refused "
                "until it does"
            )
        if not self._writer.counts.is_writing:
            return "the journal cannot be written to (is the disk full?): new requests are refused until it can"
        return None

    def collect(self) -> Iterator[Metric]:
        """Yields all families; see docs/metrics.md for what each means."""
        counts, stuck_s = self._writer.counts, self._disk.busy_s if self._is_stuck else 0.0
        yield SummaryMetricFamily(
            "moemesh_journal_commit_seconds", "Commits of the journal, with their time", counts.commits, counts.commit_s
        )
        for name, text, number in (
            ("moemesh_journal_failed_commits", "Commits that the disk did not take", counts.failed_commits),
            ("moemesh_journal_rewrites", "Times that the files were gone and were written again", counts.rewrites),
            ("moemesh_requests_restored", "Unfinished requests of the journal at start", counts.restored_requests),
        ):
            yield CounterMetricFamily(name, text, number)
        for name, text, value in (
            (
                "moemesh_journal_writing",
                "0 while the disk takes nothing, and new requests are refused",
                self.trouble() is None,
            ),
            ("moemesh_journal_unwritten_steps", "Steps that wait in memory for the disk", len(self._queue.backlog)),
            ("moemesh_journal_stuck_seconds", "How long the disk has not answered; 0 while it does", stuck_s),
        ):
            yield GaugeMetricFamily(name, text, value)

    def restore(self) -> list[JournalledRequest]:
        """Returns every request of the journal, by acceptance. Call it once, at the start: those that have not ended
        are open again.

        Raises ValueError if the file is damaged.
        """
        requests = self._writer.restore()
        self._writer.counts.restored_requests = sum(request.ended_s is None for request in requests.values())
        self._queue.expire(self._queue.wall_clock() - self._retention_s)
        return [request for number, request in requests.items() if number not in self._queue.expired]

    def close(self) -> None:
        """Hands the disk what is left to be written; the owner of the disk waits for it."""
        self._queue.push_pending()
        self._disk.submit(self._writer.close)

    # ---- between the threads

    def _schedule(self) -> None:
        with self._queue.lock:
            if self._is_scheduled:
                return
            self._is_scheduled = True
        self._disk.submit(self._work)

    def _work(self) -> None:
        with self._queue.lock:
            self._is_scheduled = False
            is_compaction_due, self._is_compaction_due = self._is_compaction_due, False
        self._writer.work(is_compaction_due)

    def _watch(self) -> None:
        """Runs in the mesh thread, which nothing of the disk's can stop."""
        queue, stuck_s = self._queue, self._disk.busy_s
        with queue.lock:
            queue.check_fenced()
            if stuck_s > STUCK_AFTER_S:
                self._is_stuck = True
                queue.deliver(queue.last_step)
                queue.refuse_all(JournalError(self.trouble() or NOT_WRITABLE))
                if stuck_s >= self._next_word_s:
                    self._next_word_s = 2 * stuck_s
                    log.error("journal_stuck", stuck_s=round(stuck_s, 1), steps_unwritten=len(queue.backlog))
            elif self._is_stuck:
                self._is_stuck = False
                self._next_word_s = STUCK_AFTER_S
                log.info("journal_answers_again", steps_unwritten=len(queue.backlog))
                self._schedule()


class JournalWriter:
    """Writes what waits in the queue, and settles with those that wait for it. All of it runs in the disk's thread."""

    def __init__(
        self,
        store: JournalStore,
        queue: JournalQueue,
        check_term: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`check_term` raises FencedError once another router has the state folder; it is asked before each commit."""
        self._store = store
        self._queue = queue
        self._check_term = check_term
        self._clock = clock
        self._in_log: list[StepRecord] = []
        """Steps that stand in the log and not yet in the other tables."""
        self.failed_s = float("-inf")
        """When the disk last refused steps."""
        self.is_lost = False
        """The files are gone, and could not be written again yet."""
        self.counts = JournalCounts()

    def restore(self) -> dict[int, JournalledRequest]:
        """Reads the file, once, at the start, in any thread. Raises ValueError and sqlite3.Error."""
        requests, self._in_log = self._store.read()
        ended = [request for step in self._in_log for request, _, _ in step.ends]
        self._queue.ledger.last_number = max([0, *requests, *ended])
        for request in requests.values():
            self._queue.ledger.restore(request)
        return requests

    def work(self, is_compaction_due: bool) -> None:
        """Writes everything that waits to be written. Raises FencedError."""
        queue = self._queue
        with queue.lock:
            accepting, flushes = list(queue.accepting), list(queue.flushes)
        try:
            self._check_term()
        except FencedError as error:
            queue.fence(error)
            raise
        is_written = self._write_backlog()
        for request in accepting:
            self._write_request(request, is_written)
        if is_compaction_due and is_written:
            self._compact()
        with queue.lock:
            for flush in flushes:
                if flush in queue.flushes:
                    queue.flushes.remove(flush)
                    settle(flush, is_written)

    def close(self) -> None:
        """Writes what is left, and merges the WAL into the file. A router that was replaced writes nothing."""
        try:
            self._queue.check_fenced()
            self._check_term()
            self._write_backlog()
            self._write(lambda: None)  # looks whether the files are there
        except FencedError as error:
            log.warning("journal_not_flushed", reason=error.message)
        try:
            self._store.close()
        except sqlite3.Error as error:
            log.warning("journal_not_closed", reason=str(error))

    def _write_backlog(self) -> bool:
        with self._queue.lock:
            steps, newest = list(self._queue.backlog), self._queue.last_step
        is_written = True
        if steps:
            encoded = [encode_step(step) for step in steps]
            is_written = self._commit(lambda: self._store.append_steps(encoded), steps)
        if not is_written:
            self.failed_s = self._clock()
        self._queue.deliver(newest)
        return is_written

    def _write_request(self, request: LedgerRequest, may_be_written: bool) -> None:
        queue = self._queue
        with queue.lock:
            if queue.ledger.requests.get(request.accepted.reply_id) is not request:
                queue.accepting.pop(request, None)  # its client is gone, or was refused since the disk did not answer
                return
        is_written = may_be_written and self._commit(
            lambda: self._store.insert_request(request.number, request.accepted)
        )
        with queue.lock:
            if (future := queue.accepting.pop(request, None)) is None:
                return
            if not is_written:
                queue.end(request.accepted.reply_id, is_kept=False)
            settle(future, None if is_written else JournalError(NOT_WRITABLE))

    def _compact(self) -> None:
        with self._queue.lock:
            expired = list(self._queue.expired)
        if not (self._in_log or expired):
            self._write(lambda: None)  # looks whether the files are there
            return
        runs: list[Run] = []
        if self._commit(lambda: runs.extend(self._store.compact(self._in_log, expired))):
            self._in_log = []
            with self._queue.lock:
                self._queue.expired.difference_update(expired)
            self._keep_runs(runs)

    def _commit(self, write: Callable[[], None], steps: Sequence[StepRecord] = ()) -> bool:
        """Does `write`, and counts it if the disk takes it. Then `steps`, which are what it logs, wait no longer."""
        started_s = self._clock()
        if not self._write(write):
            return False
        self.counts.commits += 1
        self.counts.commit_s += self._clock() - started_s
        for step in steps:
            if self._queue.note_written(step):  # else the files were written again, and have it
                self._in_log.append(step)
        return True

    def _write(self, write: Callable[[], None]) -> bool:
        """Returns False if the disk does not take it. Where the files are gone, all is written into new ones."""
        counts = self.counts
        try:
            try:
                if self.is_lost or not self._store.is_in_place():
                    raise LostFilesError
                write()
            except LostFilesError:
                self._rewrite()
        except (sqlite3.Error, OSError, ConfigurationError) as error:
            counts.failed_commits += 1
            if counts.is_writing:
                counts.is_writing = False
                log.error("journal_not_written", reason=str(error))
            return False
        if not counts.is_writing:
            counts.is_writing = True
            log.info("journal_written_again")
        return True

    def _rewrite(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            log.error("journal_gone", detail="its files were removed or changed by something else")
        with self._queue.lock:
            requests, steps = list(self._queue.ledger.requests.values()), list(self._queue.backlog)
        runs = self._store.rewrite(requests, [*self._in_log, *steps])
        self._in_log = []
        self._keep_runs(runs)
        for step in steps:
            self._queue.note_written(step)
        self.is_lost = False
        self.counts.rewrites += 1
        log.info("journal_rewritten", requests=len(requests))

    def _keep_runs(self, runs: Sequence[Run]) -> None:
        with self._queue.lock:
            for choice, first, data in runs:
                self._queue.ledger.add_run(choice, first, data)


def open_journal(
    path: Path,
    model: str,
    check_term: Callable[[], None],
    disk: DiskThread,
    *,
    is_synchronous: bool,
    retention_s: float,
) -> tuple[Journal, list[JournalledRequest]]:
    """Returns the journal, and what a router before this one left in it.

    `model` is what the tokens depend on; a journal that holds requests of another one is refused. With `is_synchronous`
    every commit waits for the disk. `check_term` raises FencedError once another router has the state folder; it is
    asked before each commit.

    Raises ConfigurationError, which says what to do.
    """
    try:
        store = JournalStore(open_database(path, model, is_synchronous), path, model, is_synchronous)
    except (sqlite3.Error, OSError, *UNREADABLE) as error:
        raise damaged(path, error) from None
    queue = JournalQueue(time.time)
    journal = Journal(queue, JournalWriter(store, queue, check_term), retention_s, disk)
    try:
        return journal, journal.restore()
    except (sqlite3.Error, *UNREADABLE) as error:
        store.close()
        raise damaged(path, error) from None
