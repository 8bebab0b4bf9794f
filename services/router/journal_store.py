"""The journal's file: SQLite in WAL mode. What its tables are, how it is opened and refused, what is read back.

A step is one row in `log`, so that a group commit is one statement. Once a second the log is folded: tokens go to
`segments`, by choice, where they can be deleted by choice; placements, errors and ends to tables of their own; the log
is emptied.
All of a fold is one transaction, so a reader finds a token in one of the two places.

A process that is killed at any byte leaves a prefix of what was committed (SQLite checks every frame of the WAL).
Without `synchronous`, that holds for the process only, and not for the machine.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgpack
import xxhash

from common.errors import ConfigurationError
from common.ids import RequestId, SequenceId
from services.router.engine import GeneratedToken
from services.router.journal_records import (
    MAX_CHOICES,
    AcceptedRequest,
    JournalledChoice,
    JournalledRequest,
    StepRecord,
    decode_step,
    decode_tokens,
    encode_tokens,
    restored_error,
)

SCHEMA_VERSION = "2"
BUSY_WITHIN_S = 5.0
"""How long a journal that somebody else has open is waited for."""
MAX_ROWS = 400
"""In one statement, of two values each: a SQLite may be built to take 999 and no more. A disk that was full leaves far
more to write."""
UNREADABLE = (ValueError, TypeError, LookupError)
"""What Python's sqlite3 and this module raise over a damaged file, besides sqlite3.Error."""
_WAL_LIMIT_BYTES = 16 << 20
_REQUEST_COLUMNS = (
    "number, reply_id, created_s, accepted_s, route, tenant, client_request_id, idempotency_key, body_hash, body, "
    "seed, is_resumable, choice_ids"
)
# `checksum` is of the other columns of its row: SQLite's own check sees where rows lie, not what stands in them.
_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE requests ({_REQUEST_COLUMNS.replace("number", "number INTEGER PRIMARY KEY", 1)}, checksum);
CREATE TABLE ends (request INTEGER PRIMARY KEY, ended_s, checksum);
CREATE TABLE placements (choice INTEGER PRIMARY KEY, sequence_id, checksum);
CREATE TABLE failures (choice INTEGER PRIMARY KEY, code, message, checksum);
CREATE TABLE segments (choice INTEGER, first INTEGER, tokens, checksum, PRIMARY KEY (choice, first)) WITHOUT ROWID;
CREATE TABLE log (number INTEGER PRIMARY KEY, step, checksum);
"""


@dataclass(slots=True)
class FoldBuffer:
    """What stands in the log and not yet in the other tables."""

    tokens: dict[int, tuple[int, list[GeneratedToken]]] = field(default_factory=dict)
    """choice -> (position of the first, tokens)."""
    placements: dict[int, int] = field(default_factory=dict)
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    ends: dict[int, tuple[float, bool]] = field(default_factory=dict)

    def add(self, record: StepRecord) -> None:
        """A step was written to the log."""
        for choice, position, token in record.tokens:
            self.tokens.setdefault(choice, (position, []))[1].append(token)
        self.placements.update(record.placements)
        self.failures.update({choice: (code, message) for choice, code, message in record.failures})
        self.ends.update({request: (ended_s, is_kept) for request, ended_s, is_kept in record.ends})

    def __bool__(self) -> bool:
        return bool(self.tokens or self.placements or self.failures or self.ends)


class JournalStore:
    """Open with `open_store`. Methods raise sqlite3.Error, and leave no transaction open."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def insert_request(self, number: int, accepted: AcceptedRequest) -> None:
        """Committed when it returns."""
        values = (
            number,
            accepted.reply_id,
            accepted.created_s,
            accepted.accepted_s,
            accepted.route,
            accepted.tenant,
            accepted.client_request_id,
            accepted.idempotency_key,
            accepted.body_hash,
            accepted.body,
            accepted.seed,
            int(accepted.is_resumable),
            json.dumps(accepted.choice_ids),
        )
        self._connection.execute(_insert("requests", len(values)), seal(values))

    def append_steps(self, steps: Sequence[bytes]) -> None:
        """One transaction, and few statements: each one lets another thread have the interpreter for a while."""
        if len(steps) <= MAX_ROWS:
            _insert_steps(self._connection, steps)  # a step as it comes: one statement is a transaction
            return
        with self._transaction() as connection:
            for first in range(0, len(steps), MAX_ROWS):
                _insert_steps(connection, steps[first : first + MAX_ROWS])

    def fold(self, buffer: FoldBuffer, expired: Iterable[int]) -> None:
        """Empty the log, whose content is `buffer`; delete what ended and is not kept, and the expired requests."""
        dropped = {request for request, (_, is_kept) in buffer.ends.items() if not is_kept} | set(expired)
        with self._transaction() as run:
            segments = [
                (choice, first, encode_tokens(tokens))
                for choice, (first, tokens) in buffer.tokens.items()
                if choice // MAX_CHOICES not in dropped
            ]
            ends = [(request, ended_s) for request, (ended_s, is_kept) in buffer.ends.items() if is_kept]
            failures = [(choice, *failure) for choice, failure in buffer.failures.items()]
            rows: tuple[tuple[str, list[Any]], ...] = (
                ("segments", segments),
                ("placements", list(buffer.placements.items())),
                ("failures", failures),
                ("ends", ends),
            )
            for table, values in rows:
                if values:
                    run.executemany(_insert(table, len(values[0])), map(seal, values))
            run.executemany("DELETE FROM requests WHERE number = ?", [(request,) for request in dropped])
            ranges = [(request * MAX_CHOICES, (request + 1) * MAX_CHOICES) for request in dropped]
            run.executemany("DELETE FROM ends WHERE request = ?", [(request,) for request in dropped])
            for table in ("segments", "placements", "failures"):
                run.executemany(f"DELETE FROM {table} WHERE choice >= ? AND choice < ?", ranges)
            run.execute("DELETE FROM log")

    def read(self) -> tuple[dict[int, JournalledRequest], FoldBuffer]:
        """Every request by its number, in the order of their acceptance; and what the log holds.

        Raises ValueError if a row is not what was written.
        """
        ends: dict[int, float] = dict(self._rows("ends", "request, ended_s"))
        requests = {
            number: JournalledRequest(
                _accepted(row), tuple(JournalledChoice() for _ in json.loads(row[-1])), ends.get(number), number
            )
            for number, *row in self._rows("requests", _REQUEST_COLUMNS)
        }
        _place(requests, dict(self._rows("placements", "choice, sequence_id")))
        failures = self._rows("failures", "choice, code, message")
        _fail(requests, {choice: (code, message) for choice, code, message in failures})
        for choice, first, data in self._rows("segments", "choice, first, tokens"):
            _extend(requests, choice, first, decode_tokens(data))
        buffer = FoldBuffer()
        for (data,) in self._rows("log", "step", "number"):
            buffer.add(decode_step(data))
        for choice, (first, tokens) in buffer.tokens.items():
            _extend(requests, choice, first, tokens)
        _place(requests, buffer.placements)
        _fail(requests, buffer.failures)
        for number, (ended_s, is_kept) in buffer.ends.items():
            if number in requests:
                ended = requests.pop(number)
                if is_kept:
                    requests[number] = replace(ended, ended_s=ended_s)
        return dict(sorted(requests.items())), buffer

    def _rows(self, table: str, columns: str, order: str = "") -> Iterator[Any]:
        """Ascending. Raises ValueError for a row that is not what was written."""
        for *row, checksum in self._connection.execute(
            f"SELECT {columns}, checksum FROM {table} ORDER BY {order or columns}"
        ):
            if seal(row)[-1] != checksum:
                raise ValueError(f"a row of the table {table} is not what was written")
            yield row

    def close(self) -> None:
        """Fold the WAL into the file."""
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


def open_store(path: Path, model: str, is_synchronous: bool) -> JournalStore:
    """`model`: what the tokens depend on; a journal that holds requests of another one is refused.

    Raises ConfigurationError, which says what to do.
    """
    try:
        connection = _connect(path, is_synchronous)
    except (sqlite3.Error, *UNREADABLE) as error:
        raise damaged(path, error) from None
    try:
        _check(connection, path, model)
    except (sqlite3.Error, *UNREADABLE) as error:
        connection.close()
        raise damaged(path, error) from None
    except ConfigurationError:
        connection.close()
        raise
    return JournalStore(connection)


def damaged(path: Path, error: Exception) -> ConfigurationError:
    """What to do about a journal that cannot be read."""
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
        # A journal in good order: whoever moved it away would lose its requests for nothing.
        return ConfigurationError(
            f"another process has the journal {path} open, perhaps a router that is stopped: end that one first"
        )
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return ConfigurationError(f"there is no room for the journal {path}: make some, or set JOURNAL=off")
    return ConfigurationError(
        f"the journal {path} cannot be read ({error}): move it and its -wal file away to start without the requests "
        "in it, or set JOURNAL=off"
    )


def _connect(path: Path, is_synchronous: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_WITHIN_S)
    for setting in (
        # Nobody else reads it while a router runs (the folder is locked), so no index is shared over a file.
        "locking_mode = EXCLUSIVE",
        "journal_mode = WAL",
        f"synchronous = {'FULL' if is_synchronous else 'OFF'}",
        f"journal_size_limit = {_WAL_LIMIT_BYTES}",
    ):
        try:
            connection.execute(f"PRAGMA {setting}")
        except (sqlite3.Error, *UNREADABLE):
            connection.close()
            raise
    return connection


def _check(connection: sqlite3.Connection, path: Path, model: str) -> None:
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    if not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        # All at once: half a schema would be another version.
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.executemany("INSERT INTO meta VALUES (?, ?)", [("schema", SCHEMA_VERSION), ("model", model)])
        connection.execute("COMMIT")
        return
    meta: Mapping[str, str] = dict(connection.execute("SELECT name, value FROM meta"))
    if meta.get("schema") != SCHEMA_VERSION:
        raise ConfigurationError(
            f"the journal {path} has version {meta.get('schema')}, this build writes {SCHEMA_VERSION}: let the build "
            "that wrote it finish its requests, then move the file away"
        )
    if meta.get("model") == model:
        return
    if connection.execute("SELECT count(*) FROM requests").fetchone()[0]:
        raise ConfigurationError(
            f"the journal {path} holds requests of another model or dtype ({meta.get('model')}; this is {model}): "
            "serve that one until they have ended, move the file away to drop them, or give another STATE_DIR"
        )
    connection.execute("UPDATE meta SET value = ? WHERE name = 'model'", (model,))


def _insert_steps(connection: sqlite3.Connection, steps: Sequence[bytes]) -> None:
    marks = ",".join(["(?, ?)"] * len(steps))
    connection.execute(
        f"INSERT INTO log (step, checksum) VALUES {marks}", [value for step in steps for value in seal((step,))]
    )


def _insert(table: str, num_values: int) -> str:
    return f"INSERT OR REPLACE INTO {table} VALUES ({','.join('?' * (num_values + 1))})"


def seal(row: Sequence[Any]) -> tuple[Any, ...]:
    """A row with its checksum behind it, as a signed integer of 64 bits."""
    return (*row, xxhash.xxh3_64_intdigest(msgpack.packb(list(row))) - (1 << 63))


def _accepted(row: Sequence[Any]) -> AcceptedRequest:
    """`row`: as `_REQUEST_COLUMNS` behind the number."""
    values: dict[str, Any] = dict(zip(_REQUEST_COLUMNS.split(", ")[1:], row, strict=True))
    values["is_resumable"] = bool(values["is_resumable"])
    values["choice_ids"] = tuple(RequestId(choice_id) for choice_id in json.loads(values["choice_ids"]))
    return AcceptedRequest(**values)


def _choice(requests: Mapping[int, JournalledRequest], number: int) -> JournalledChoice | None:
    request = requests.get(number // MAX_CHOICES)
    return None if request is None else request.choices[number % MAX_CHOICES]


def _extend(requests: Mapping[int, JournalledRequest], number: int, first: int, tokens: list[GeneratedToken]) -> None:
    """What would leave a hole is dropped: the mesh makes the same tokens again."""
    choice = _choice(requests, number)
    if choice is not None and first == len(choice.tokens):
        choice.tokens += tokens


def _place(requests: Mapping[int, JournalledRequest], placements: Mapping[int, int]) -> None:
    for number, sequence_id in placements.items():
        choice = _choice(requests, number)
        if choice is not None:
            choice.sequence_id = SequenceId(sequence_id)


def _fail(requests: Mapping[int, JournalledRequest], failures: Mapping[int, tuple[str, str]]) -> None:
    for number, (code, message) in failures.items():
        choice = _choice(requests, number)
        if choice is not None:
            choice.error = restored_error(code, message)
