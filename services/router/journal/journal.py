"""What must outlive the router: each accepted request, its seed, its tokens, and how it ended.

Journal first, then send: the tokens of a step are handed on to the front once they are written, so that no client has
seen a token that a restarted router does not know. All that touches the disk happens in a thread of its own
(`writer.py`); a disk that takes nothing, or hangs for longer than STUCK_AFTER_S, stops nobody: running requests
go on, their steps wait in memory, in order (`queue.py`), and are written as soon as the disk takes them; new
requests are refused meanwhile.

What the files hold is in memory, too (`ledger.py`): files that are gone are written anew.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from common.errors import JournalError, MoemeshError
from common.ids import RequestId, SequenceId
from services.router.engine import GeneratedToken
from services.router.journal.disk_thread import Disk
from services.router.journal.files import UNREADABLE, damaged
from services.router.journal.queue import JournalQueue
from services.router.journal.records import AcceptedRequest, JournalledRequest
from services.router.journal.store import JournalStore, open_store
from services.router.journal.writer import NOT_TAKEN, JournalWriter, WriterCounts

FOLD_INTERVAL_S = 1.0
RETRY_INTERVAL_S = 0.5
"""Between two attempts to write while the disk takes nothing."""
STUCK_AFTER_S = 1.0
"""A disk that has not answered for so long is no longer waited for: tokens are handed on, marked as not durable, and
new requests are refused, until it answers."""


@dataclass(slots=True)
class JournalCounts(WriterCounts):
    """Since the start of the router; `is_writing` is False also while the disk hangs."""

    stuck_s: float = 0.0
    """How long the disk has not answered; 0.0 while it does."""
    steps_unwritten: int = 0
    restored_requests: int = 0


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
        queue: JournalQueue,
        writer: JournalWriter,
        settings: JournalSettings,
        disk: Disk,
        log: structlog.stdlib.BoundLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`writer` does its work in `disk`."""
        self._queue = queue
        self._writer = writer
        self._settings = settings
        self._disk = disk
        self._log = log
        self._clock = clock
        self._is_scheduled = False
        self._is_stuck = False
        self._is_fold_due = False
        self._next_fold_s = 0.0
        self._next_word_s = STUCK_AFTER_S
        self._num_restored = 0

    # ---- what the front and the mesh thread write

    def accept(self, accepted: AcceptedRequest) -> Future[None]:
        """See RequestJournal."""
        future: Future[None] = Future()
        with self._queue.lock:
            self._queue.check_fenced()
            if self._is_stuck:
                future.set_exception(JournalError(self.trouble() or NOT_TAKEN))
                return future
            self._queue.accept(accepted, future)
        self._schedule()
        return future

    def append(
        self,
        outcomes: Sequence[tuple[RequestId, GeneratedToken | MoemeshError]],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """The outcomes of a step. `then` hands them on: once they are written, or it is known that the disk does not
        take them or hangs; in the order of the steps, and in any thread. Raises FencedError; never handed on then.

        What the disk does not take is kept in memory, and `has_written` says so until it does.
        """
        queue = self._queue
        with queue.lock:
            queue.check_fenced()
            queue.append(outcomes, then)
            may_be_taken = self._writer.counts.is_writing or self._clock() - self._writer.failed_s >= RETRY_INTERVAL_S
            if queue.backlog and may_be_taken and not self._is_stuck:
                self._schedule()
            else:
                queue.deliver(queue.last_step)

    def note_placement(self, request_id: RequestId, sequence_id: SequenceId) -> None:
        """The choice has this number on the wire from now on; written with the next commit."""
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
        """Call often: folds the log, deletes what is over, tries again what failed, and goes on without a disk that
        hangs. Raises FencedError."""
        self._watch()
        now_s = self._clock()
        if now_s < self._next_fold_s:
            return
        self._next_fold_s = now_s + FOLD_INTERVAL_S
        self._queue.push_pending()
        self._queue.expire(self._queue.wall_clock() - self._settings.retention_s)
        self._is_fold_due = True
        self._schedule()

    # ---- what is read

    @property
    def is_durable(self) -> bool:
        """Whether everything that was handed in so far is written."""
        return not self._queue.backlog and not self._writer.is_lost

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

    def counts(self) -> JournalCounts:
        """A copy."""
        counts = JournalCounts(
            **asdict(self._writer.counts),
            stuck_s=self._disk.busy_s if self._is_stuck else 0.0,
            steps_unwritten=len(self._queue.backlog),
            restored_requests=self._num_restored,
        )
        counts.is_writing = counts.is_writing and not self._is_stuck
        return counts

    def restore(self) -> list[JournalledRequest]:
        """Once, at the start: every request of the journal by acceptance; those that have not ended are open again.

        Raises ValueError if the file is damaged.
        """
        requests = self._writer.restore()
        self._num_restored = sum(request.ended_s is None for request in requests.values())
        self._queue.expire(self._queue.wall_clock() - self._settings.retention_s)
        return [request for number, request in requests.items() if number not in self._queue.expired]

    def close(self) -> None:
        """Hand the disk what is left to be written; who owns the disk waits for it."""
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
            is_fold_due, self._is_fold_due = self._is_fold_due, False
        self._writer.work(is_fold_due)

    def _watch(self) -> None:
        """In the mesh thread, which nothing of the disk's can stop."""
        queue, stuck_s = self._queue, self._disk.busy_s
        with queue.lock:
            queue.check_fenced()
            if stuck_s > STUCK_AFTER_S:
                self._is_stuck = True
                queue.deliver(queue.last_step)
                queue.refuse_all(JournalError(self.trouble() or NOT_TAKEN))
                if stuck_s >= self._next_word_s:
                    self._next_word_s = 2 * stuck_s
                    self._log.error("journal_stuck", stuck_s=round(stuck_s, 1), steps_unwritten=len(queue.backlog))
            elif self._is_stuck:
                self._is_stuck = False
                self._next_word_s = STUCK_AFTER_S
                self._log.info("journal_answers_again", steps_unwritten=len(queue.backlog))
                self._schedule()


def open_journal(
    path: Path,
    model: str,
    settings: JournalSettings,
    check_term: Callable[[], None],
    disk: Disk,
    log: structlog.stdlib.BoundLogger,
) -> tuple[Journal, list[JournalledRequest]]:
    """The journal, and what a router before this one left in it. `model`: see `open_store`.

    `check_term` raises FencedError once another router has the state folder; asked before each commit.

    Raises ConfigurationError, which says what to do.
    """
    store: JournalStore = open_store(path, model, settings.is_synchronous)
    queue = JournalQueue(time.time)
    journal = Journal(queue, JournalWriter(store, queue, check_term, log), settings, disk, log)
    try:
        return journal, journal.restore()
    except (sqlite3.Error, *UNREADABLE) as error:
        store.close()
        raise damaged(path, error) from None
