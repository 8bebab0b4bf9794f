"""The journal's file: SQLite in WAL mode. What its tables are, how it is opened and refused, what is read back.

A step is one row in `log`, so that a group commit is one statement. Once a second the log is compacted: tokens go to
`segments`, by choice, where they can be deleted by choice; placements, errors and ends to tables of their own; the log
is emptied.
All of a compaction is one transaction, so a reader finds a token in one of the two places.

A process that is killed at any byte leaves a prefix of what was committed (SQLite checks every frame of the WAL).
Without `synchronous`, that holds for the process only, and not for the machine.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import xxhash

from common.ids import RequestId, SequenceId
from services.router.engine import Token
from services.router.journal.files import (
    REQUEST_COLUMNS,
    LostFilesError,
    look_at,
    move_aside,
    open_database,
)
from services.router.journal.queue import LedgerRequest
from services.router.journal.records import (
    MAX_CHOICES,
    AcceptedRequest,
    JournalledChoice,
    JournalledRequest,
    StepRecord,
    count_tokens,
    decode_step,
    encode_tokens,
    restored_error,
)

MAX_ROWS = 400
"""The most rows of a statement, of two values each: a SQLite may be built to accept 999 and no more. A disk that was
full leaves far more to write."""


class LogContent:
    """What steps of the log say together, as the other tables have it."""

    def __init__(self, steps: Iterable[StepRecord]) -> None:
        self.tokens: dict[int, tuple[int, list[Token]]] = {}
        """choice -> (position of the first, tokens)."""
        self.placements: dict[int, int] = {}
        self.failures: dict[int, tuple[str, str]] = {}
        self.ends: dict[int, tuple[float, bool]] = {}
        for step in steps:
            for choice, position, token in step.tokens:
                self.tokens.setdefault(choice, (position, []))[1].append(token)
            self.placements.update(step.placements)
            self.failures.update({choice: (code, message) for choice, code, message in step.failures})
            self.ends.update({request: (ended_s, is_kept) for request, ended_s, is_kept in step.ends})


Run = tuple[int, int, bytes]
"""(choice, position of the first, packed tokens)."""


class JournalStore:
    """It is made by `open_journal`. Methods raise sqlite3.Error and OSError, and leave no transaction open."""

    def __init__(self, connection: sqlite3.Connection, path: Path, model: str, is_synchronous: bool) -> None:
        self._connection = connection
        self._path = path
        self._model = model
        self._is_synchronous = is_synchronous
        self._left_as = look_at(path)

    def is_in_place(self) -> bool:
        """Says whether the files are as the last write left them: a process goes on writing into a file that was
        removed, and never hears of it. It costs four `stat` at most."""
        return look_at(self._path) == self._left_as

    def insert_request(self, number: int, accepted: AcceptedRequest) -> None:
        """Inserts a request, which is committed when this returns."""
        with self._noted():
            _insert_all(self._connection, requests=[_request_row(number, accepted)])

    def append_steps(self, steps: Sequence[bytes]) -> None:
        """Appends in one transaction, and few statements: each one lets another thread have the interpreter for a
        while."""
        if len(steps) <= MAX_ROWS:
            with self._noted():
                _insert_steps(self._connection, steps)  # a step as it comes: one statement is a transaction
            return
        with self._noted(), self._transaction() as connection:
            for first in range(0, len(steps), MAX_ROWS):
                _insert_steps(connection, steps[first : first + MAX_ROWS])

    def compact(self, steps: Iterable[StepRecord], expired: Iterable[int]) -> list[Run]:
        """Empties the log, which has these steps; deletes what ended and is not kept, and the expired requests.

        Returns the runs of tokens that were written.
        """
        content = LogContent(steps)
        dropped = {request for request, (_, is_kept) in content.ends.items() if not is_kept} | set(expired)
        runs = _runs(content, dropped)
        with self._noted(), self._transaction() as run:
            ends = [(request, ended_s) for request, (ended_s, is_kept) in content.ends.items() if is_kept]
            failures = [(choice, *failure) for choice, failure in content.failures.items()]
            _insert_all(run, segments=runs, placements=list(content.placements.items()), failures=failures, ends=ends)
            run.executemany("DELETE FROM requests WHERE number = ?", [(request,) for request in dropped])
            ranges = [(request * MAX_CHOICES, (request + 1) * MAX_CHOICES) for request in dropped]
            run.executemany("DELETE FROM ends WHERE request = ?", [(request,) for request in dropped])
            for table in ("segments", "placements", "failures"):
                run.executemany(f"DELETE FROM {table} WHERE choice >= ? AND choice < ?", ranges)
            run.execute("DELETE FROM log")
        return runs

    def rewrite(self, requests: Sequence[LedgerRequest], steps: Iterable[StepRecord]) -> list[Run]:
        """Makes a new file in the place of one that is gone: `requests`, and the tokens that are only in `steps`.

        Returns the runs of tokens of `steps`. A file that something else has put there is moved aside.
        """
        with suppress(sqlite3.Error):  # the files that it was of are gone: nothing of it is missed
            self._connection.close()
        # The folder may be gone, too. It is as private as at the first start.
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        move_aside(self._path)
        numbers = {request.number for request in requests}
        runs = [run for run in _runs(LogContent(steps)) if run[0] // MAX_CHOICES in numbers]
        self._connection = open_database(self._path, self._model, self._is_synchronous)
        try:
            with self._transaction() as run:
                _insert_all(run, **_rows_of(requests, runs))
        except BaseException:
            # Half of it would be taken for another process's file by the next attempt, and for all of it by a restart.
            self._connection.close()
            self._path.unlink(missing_ok=True)
            raise
        self._left_as = look_at(self._path)
        return runs

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Raises LostFilesError if what was written is in a file that is gone: its name stands for another one."""
        try:
            yield
        finally:  # a commit that fails leaves traces, too
            now = look_at(self._path)
            for old, new in zip(self._left_as, now, strict=True):
                if old is not None and (new is None or new.file != old.file):
                    raise LostFilesError(f"{self._path} is gone, or another file")
            self._left_as = now

    def read(self) -> tuple[dict[int, JournalledRequest], list[StepRecord]]:
        """Returns every request by its number, in the order of their acceptance, and the steps that the log holds.

        Raises ValueError if a row is not what was written.
        """
        ends: dict[int, float] = dict(self._rows("ends", "request, ended_s"))
        requests = {
            number: JournalledRequest(
                _accepted(row), tuple(JournalledChoice() for _ in json.loads(row[-1])), ends.get(number), number
            )
            for number, *row in self._rows("requests", REQUEST_COLUMNS)
        }
        steps = [decode_step(data) for (data,) in self._rows("log", "step", "number")]
        content = LogContent(steps)
        self._read_choices(requests.values(), content)
        for number, (ended_s, is_kept) in content.ends.items():
            if number in requests:
                ended = requests.pop(number)
                if is_kept:
                    requests[number] = replace(ended, ended_s=ended_s)
        return dict(sorted(requests.items())), steps

    def _read_choices(self, requests: Iterable[JournalledRequest], content: LogContent) -> None:
        """Gives each choice what the tables and the log have of it. What would leave a hole is dropped: the mesh makes
        the same tokens again."""
        choices = {
            request.number * MAX_CHOICES + index: choice
            for request in requests
            for index, choice in enumerate(request.choices)
        }
        for number, first, data in self._rows("segments", "choice, first, tokens"):
            if count_tokens(data) and number in choices and first == choices[number].num_tokens:
                choices[number].runs.append((first, data))
        placements = dict(self._rows("placements", "choice, sequence_id")) | content.placements
        failures = {choice: failure for choice, *failure in self._rows("failures", "choice, code, message")}
        for number, choice in choices.items():
            first, tokens = content.tokens.get(number, (0, []))
            if first == choice.num_tokens:
                choice.fresh += tokens
            if number in placements:
                choice.sequence_id = SequenceId(placements[number])
            if failure := content.failures.get(number) or failures.get(number):
                choice.error = restored_error(*failure)

    def _rows(self, table: str, columns: str, order: str = "") -> Iterator[Any]:
        """Yields the rows of a table, ascending. Raises ValueError for one that is not what was written."""
        for *row, checksum in self._connection.execute(
            f"SELECT {columns}, checksum FROM {table} ORDER BY {order or columns}"
        ):
            if seal(row)[-1] != checksum:
                raise ValueError(f"a row of the table {table} is not what was written")
            yield row

    def close(self) -> None:
        """Merges the WAL into the file."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def _runs(content: LogContent, dropped: Set[int] = frozenset()) -> list[Run]:
    return [
        (choice, first, encode_tokens(tokens))
        for choice, (first, tokens) in content.tokens.items()
        if choice // MAX_CHOICES not in dropped
    ]


def _rows_of(requests: Sequence[LedgerRequest], runs: Sequence[Run]) -> dict[str, Sequence[Sequence[Any]]]:
    """Returns rows by table; `runs` are those that the requests do not have yet."""
    choices = [choice for request in requests for choice in request.choices]
    return {
        "requests": [_request_row(request.number, request.accepted) for request in requests],
        "segments": [(choice.number, *each) for choice in choices for each in choice.runs] + list(runs),
        "placements": [(choice.number, choice.sequence_id) for choice in choices if choice.sequence_id is not None],
        "failures": [(choice.number, *choice.failure) for choice in choices if choice.failure is not None],
        "ends": [(request.number, request.ended_s) for request in requests if request.ended_s is not None],
    }


def _insert_all(connection: sqlite3.Connection, **rows_by_table: Sequence[Sequence[Any]]) -> None:
    for table, rows in rows_by_table.items():
        if rows:
            marks = ",".join("?" * (len(rows[0]) + 1))
            connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", map(seal, rows))


def _insert_steps(connection: sqlite3.Connection, steps: Sequence[bytes]) -> None:
    marks = ",".join(["(?, ?)"] * len(steps))
    connection.execute(
        f"INSERT INTO log (step, checksum) VALUES {marks}", [value for step in steps for value in seal((step,))]
    )


def seal(row: Sequence[Any]) -> tuple[Any, ...]:
    """Returns a row with its checksum behind it, as a signed integer of 64 bits."""
    return (*row, xxhash.xxh3_64_intdigest(msgpack.packb(list(row))) - (1 << 63))


def _request_row(number: int, accepted: AcceptedRequest) -> tuple[Any, ...]:
    values = {name: getattr(accepted, name) for name in REQUEST_COLUMNS.split(", ")[1:]}
    values["is_resumable"] = int(accepted.is_resumable)
    values["choice_ids"] = json.dumps(accepted.choice_ids)
    return (number, *values.values())


def _accepted(row: Sequence[Any]) -> AcceptedRequest:
    """Reads `row`, which is as `REQUEST_COLUMNS` behind the number."""
    values: dict[str, Any] = dict(zip(REQUEST_COLUMNS.split(", ")[1:], row, strict=True))
    values["is_resumable"] = bool(values["is_resumable"])
    values["choice_ids"] = tuple(RequestId(choice_id) for choice_id in json.loads(values["choice_ids"]))
    return AcceptedRequest(**values)
