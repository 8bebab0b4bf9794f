"""The journal's files: SQLite in WAL mode. How they are opened, refused, told from others and kept private."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from common.errors import ConfigurationError

SCHEMA_VERSION = "2"
BUSY_WITHIN_S = 5.0
"""How long to wait for a journal that another process has open."""
UNREADABLE = (ValueError, TypeError, LookupError)
"""What Python's sqlite3 and this module raise over a damaged file, besides sqlite3.Error."""
_WAL_LIMIT_BYTES = 16 << 20
REQUEST_COLUMNS = (
    "number, reply_id, created_s, accepted_s, route, tenant, client_request_id, idempotency_key, body_hash, body, "
    "seed, is_resumable, choice_ids"
)
# `checksum` is of the other columns of its row: SQLite's own check sees where rows lie, not what stands in them.
_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE requests ({REQUEST_COLUMNS.replace("number", "number INTEGER PRIMARY KEY", 1)}, checksum);
CREATE TABLE ends (request INTEGER PRIMARY KEY, ended_s, checksum);
CREATE TABLE placements (choice INTEGER PRIMARY KEY, sequence_id, checksum);
CREATE TABLE failures (choice INTEGER PRIMARY KEY, code, message, checksum);
CREATE TABLE segments (choice INTEGER, first INTEGER, tokens, checksum, PRIMARY KEY (choice, first)) WITHOUT ROWID;
CREATE TABLE log (number INTEGER PRIMARY KEY, step, checksum);
"""


class LostFilesError(Exception):
    """The journal's files are not those that it was opened with."""


@dataclass(frozen=True, slots=True)
class FileState:
    """Tells a file from another, and from itself after another process has written to it."""

    name: tuple[int, int]
    """The identity of what has the name: the file, or a link to it."""
    file: tuple[int, int]
    size: int
    changed_ns: int


def look_at(path: Path) -> tuple[FileState | None, FileState | None]:
    """Returns the state of the file and of its WAL; None for one that is not there."""
    state = _state_of(path)
    is_link = state is not None and state.name != state.file
    # SQLite keeps what it has beside a file where the file is, and not where a link to it is.
    return state, _state_of(_beside(path.resolve() if is_link else path, "-wal"))


def _state_of(path: Path) -> FileState | None:
    try:
        named = path.lstat()
        status = path.stat() if stat.S_ISLNK(named.st_mode) else named
    except (FileNotFoundError, NotADirectoryError):
        return None
    return FileState((named.st_dev, named.st_ino), (status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def move_aside(path: Path) -> None:
    """Makes room for a new journal, whatever stands there. What SQLite keeps beside a database would be taken for the
    new one's."""
    for ending in ("-wal", "-shm", "-journal"):
        beside = _beside(path, ending)
        if _is_folder(beside):
            beside.replace(_free_name(beside))
        else:
            beside.unlink(missing_ok=True)
    if _is_folder(path):
        path.replace(_free_name(path))
    elif not path.is_symlink() and not path.exists():
        return
    elif not path.is_symlink() and path.stat().st_size == 0:
        path.unlink()
    else:
        found = _beside(path, ".found")
        found = _free_name(path) if _is_folder(found) else found
        path.replace(found)
        tighten(found)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _free_name(path: Path) -> Path:
    """Returns a name for something that may not be put over another."""
    names = (_beside(path, ".found" if number == 1 else f".found-{number}") for number in count(1))
    return next(name for name in names if not name.exists() and not name.is_symlink())


def open_database(path: Path, model: str, is_synchronous: bool) -> sqlite3.Connection:
    """Opens the journal of that model, or makes it. Raises ConfigurationError, sqlite3.Error, OSError, UNREADABLE."""
    # SQLite gives its WAL the mode that the file has.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    for each in (path, _beside(path, "-wal"), _beside(path, "-shm"), _beside(path, ".found")):
        tighten(each)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_WITHIN_S)
    try:
        for setting in (
            # No other process reads it while a router runs (the folder is locked), so no index is shared over a file.
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            f"synchronous = {'FULL' if is_synchronous else 'OFF'}",
            f"journal_size_limit = {_WAL_LIMIT_BYTES}",
        ):
            connection.execute(f"PRAGMA {setting}")
        _check(connection, path, model)
    except BaseException:
        connection.close()
        raise
    return connection


def tighten(path: Path) -> None:
    """Lets only its owner read it, since prompts stand in it. One that is not there, or is another user's, stays."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            path.chmod(mode & 0o700)
    except (FileNotFoundError, PermissionError):
        return


def damaged(path: Path, error: Exception) -> ConfigurationError:
    """Says what to do about a journal that cannot be read."""
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
        # A journal in good order: moving it away would lose its requests for nothing.
        return ConfigurationError(
            f"another process has the journal {path} open, perhaps a router that is stopped: end that one first"
        )
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(error, "errno", None) == errno.ENOSPC:
        return ConfigurationError(f"there is no room for the journal {path}: make some, or set JOURNAL=off")
    return ConfigurationError(
        f"the journal {path} cannot be read ({error}): move it and its -wal file away to start without the requests "
        "in it, or set JOURNAL=off"
    )


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
