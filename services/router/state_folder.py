"""The router's folder on disk: locked while a router runs on it, and the term that grows with every start."""

from __future__ import annotations

import json
import os
from pathlib import Path

from common.errors import ConfigurationError, FencedError
from common.folder_lock import lock_folder
from common.ids import RouterTerm
from common.whole_file import write_whole


class StateFolder:
    """Open with `open_state_folder`; hold until the process ends."""

    def __init__(self, path: Path, term: RouterTerm, lock_descriptor: int) -> None:
        self.path = path
        self.term = term
        self._lock_descriptor = lock_descriptor
        self._seen = _identity(self._term_path)

    def check_term(self) -> None:
        """One `stat` while nothing has changed. Raises FencedError if another router has taken the folder since: the
        lock ends with the process that holds it, but a folder may have been copied, or the lock's file removed."""
        seen = _identity(self._term_path)
        if seen == self._seen:
            return
        term = _read_term(self._term_path)
        if term > self.term:
            raise FencedError(
                f"STATE_DIR={self.path} carries term {term}, this router has {self.term}: it was replaced while it was "
                "stopped, and ends"
            )
        self._seen = seen

    @property
    def _term_path(self) -> Path:
        return self.path / "router.json"

    def close(self) -> None:
        """Let another router have it."""
        os.close(self._lock_descriptor)


def open_state_folder(path: Path) -> StateFolder:
    """Lock the folder and take the next term. Raises ConfigurationError if another router runs on it, or it cannot be
    written to."""
    descriptor = lock_folder(path, "router")
    try:
        return StateFolder(path, _next_term(path / "router.json"), descriptor)
    except ConfigurationError:
        os.close(descriptor)
        raise


def _identity(path: Path) -> tuple[int, int]:
    """Changes with every term, since a new file is renamed into place; (0, 0) where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns


def _read_term(path: Path) -> int:
    if not path.exists():
        return 0
    try:
        term = json.loads(path.read_text())["term"]
        if type(term) is not int or term < 0:
            raise ValueError(f"term is {term!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}): remove it once no node of its mesh runs") from None
    return term


def _next_term(path: Path) -> RouterTerm:
    term = _read_term(path)
    try:
        write_whole(path, json.dumps({"term": term + 1}))
    except OSError as error:
        raise ConfigurationError(f"STATE_DIR={path.parent} cannot be written to: {error.strerror or error}") from None
    return RouterTerm(term + 1)
