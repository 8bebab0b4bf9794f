"""The router's folder on disk: locked while a router runs on it, and the term that grows with every start.

Its files are looked after while the router lives: one that is removed or damaged is made again. A term that was lost
with the folder, while no router lived, is learnt from the nodes (`outgrow`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from common.atomic_write import write_whole
from common.errors import ConfigurationError, FencedError, ProtocolError
from common.ids import RouterTerm
from common.processes.folder_lock import FolderLock, lock_folder

log = structlog.get_logger(__name__)

MAX_TERM = (1 << 31) - 1
"""Numbers of steps have the term above their lower 32 bits, and must stay positive in 64."""
_NOWHERE = (0, 0)
"""The identity of a file that is not there or cannot be looked at."""


class StateFolder:
    """Open it with `open_state_folder`, and hold it until the process ends."""

    def __init__(self, path: Path, term: RouterTerm, lock: FolderLock) -> None:
        self.path = path
        self.term = term
        self._lock = lock
        self._term_path, self._url_path = path / "router.json", path / "http.url"
        self._url = ""
        self._seen = _identity(self._term_path)
        """The identity of the term's file, when it had this router's term; the other is that of the address."""
        self._seen_url = _NOWHERE
        self._failure = ""

    def check_term(self) -> None:
        """Raises FencedError if another router has the folder since: the lock ends with the process that holds it, but
        a folder may have been copied, or the lock's file removed. It costs one `stat` while nothing has changed."""
        seen = _identity(self._term_path)
        if seen == self._seen:
            return
        term = self._term_on_disk()
        if term > self.term:
            raise FencedError(
                f"STATE_DIR={self.path} carries term {term}, this router has {self.term}: it was replaced while it was "
                "stopped, and exits"
            )
        if term == self.term:
            self._seen = seen

    def look_after(self) -> None:
        """Checks the term, and makes the files again that are gone or damaged; the log says so, or why it cannot be. It
        costs a few `stat`s while nothing has changed. Raises FencedError if another router has the folder."""
        try:
            # The lock first: a router that has lost the folder to another one must not write into it.
            keepers = (
                ("router.lock", self._lock.look_after),
                ("router.json", self._keep_term),
                ("http.url", self._keep_url),
            )
            made_again = [name for name, keep in keepers if keep()]
        except OSError as error:
            failure = f"files of STATE_DIR={self.path} are gone and cannot be recreated: {error}"
            if failure != self._failure:
                log.warning("state_files_lost", reason=failure)
            self._failure = failure
            return
        self._failure = ""
        if made_again:
            names = ", ".join(made_again)
            log.warning(
                "state_files_recreated",
                reason=f"{names} of STATE_DIR={self.path} were removed or changed and have been recreated",
            )

    def publish_url(self, url: str) -> None:
        """Writes down where this router answers HTTP, for as long as it holds the folder. Where that cannot be done,
        the log says so, and `look_after` tries again."""
        self._url = url
        try:
            self._write_url()
        except OSError as error:
            log.warning("url_file_not_written", reason=f"http.url of STATE_DIR={self.path} cannot be written: {error}")

    def _write_url(self) -> None:
        write_whole(self._url_path, self._url)
        self._seen_url = _identity(self._url_path)

    def outgrow(self, term: int, on_disk: Callable[[Callable[[], None]], None] = lambda job: job()) -> None:
        """Hears that a node has obeyed a router of this term. Raises FencedError if it is later than this one's.
        `on_disk` does what touches the folder: the caller may not wait for it.

        Either that router lives and this one was replaced, or the folder has lost its term: then the next router on it
        begins above all that nodes have heard of, or they would not listen to it.
        """
        if term <= self.term:
            return
        if term > MAX_TERM:
            raise ProtocolError(f"a router's term of {term} is above {MAX_TERM}")
        on_disk(partial(self._raise_term, term))
        raise FencedError(
            f"nodes have heard a router of term {term}, this one has {self.term}: it was replaced, or router.json of "
            f"STATE_DIR={self.path} was lost; it exits, and the next one begins above that term"
        )

    def close(self) -> None:
        """Lets another router have it."""
        with contextlib.suppress(OSError, ValueError):
            if self._url and self._url_path.read_text() == self._url:  # else another router has the folder
                self._url_path.unlink()
        self._lock.close()

    def _raise_term(self, term: int) -> None:
        if term > self._term_on_disk():
            with contextlib.suppress(OSError):  # then the next start says that the folder cannot be written to
                write_whole(self._term_path, json.dumps({"term": term}))

    def _term_on_disk(self) -> int:
        """Returns 0 where there is none that can be read: while this router lives, it is the one that knows."""
        try:
            return _read_term(self._term_path)
        except (ConfigurationError, OSError):
            return 0

    def _keep_term(self) -> bool:
        self.check_term()
        if _identity(self._term_path) == self._seen:
            return False
        write_whole(self._term_path, json.dumps({"term": self.term}))
        self._seen = _identity(self._term_path)
        return True

    def _keep_url(self) -> bool:
        is_written = self._seen_url != _NOWHERE and self._seen_url == _identity(self._url_path)
        if is_written or not self._url:
            return False
        self._write_url()
        return True


def open_state_folder(path: Path) -> StateFolder:
    """Locks the folder and draws the next term. Raises ConfigurationError if another router runs on it, or it cannot be
    written to."""
    lock = lock_folder(path, "router")
    try:
        return StateFolder(path, _next_term(path / "router.json"), lock)
    except ConfigurationError:
        lock.close()
        raise


def _identity(path: Path) -> tuple[int, int]:
    """Changes with every term, since a new file is renamed into place, and with what others write to it."""
    try:
        status = path.stat()
    except OSError:
        return _NOWHERE
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
