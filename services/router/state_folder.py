"""The router's folder on disk: locked while a router runs on it, and the term that grows with every start.

Its files are looked after while the router lives: one that somebody removes is made again. A term that was lost with
the folder, while no router lived, is learnt from the nodes (`outgrow`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from common.errors import ConfigurationError, FencedError, ProtocolError
from common.folder_lock import FolderLock, lock_folder
from common.ids import RouterTerm
from common.whole_file import write_whole

MAX_TERM = (1 << 31) - 1
"""Numbers of steps have the term above their lower 32 bits, and must stay positive in 64."""


class StateFolder:
    """Open with `open_state_folder`; hold until the process ends."""

    def __init__(self, path: Path, term: RouterTerm, lock: FolderLock) -> None:
        self.path = path
        self.term = term
        self._lock = lock
        self._url = ""
        self._seen = _identity(self._term_path)
        self._failure = ""

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

    def look_after(self, tell: Callable[[str], None] = lambda sentence: None) -> None:
        """Check the term, and make the files again that are gone; `tell` is given a sentence about it, or about why it
        cannot be. A few `stat`s while nothing has changed. Raises FencedError if another router has the folder."""
        try:
            made_again = [name for name, keep in self._keepers() if keep()]
        except OSError as error:
            failure = f"files of STATE_DIR={self.path} are gone and cannot be made again: {error}"
            if failure != self._failure:
                tell(failure)
            self._failure = failure
            return
        self._failure = ""
        if made_again:
            tell(f"{', '.join(made_again)} of STATE_DIR={self.path} had been removed, and was made again")

    def publish_url(self, url: str) -> None:
        """Say where this router answers HTTP, for as long as it holds the folder. Raises OSError."""
        self._url = url
        write_whole(self._url_path, url)

    def outgrow(self, term: int) -> None:
        """A node has obeyed a router of this term. Raises FencedError if it is later than this one's.

        Either that router lives and this one was replaced, or the folder has lost its term: then the next router on it
        begins above all that nodes have heard of, or they would not listen to it.
        """
        if term <= self.term:
            return
        if term > MAX_TERM:
            raise ProtocolError(f"a router's term of {term} is above {MAX_TERM}")
        if term > _read_term(self._term_path):
            with contextlib.suppress(OSError):  # then the next start says that the folder cannot be written to
                write_whole(self._term_path, json.dumps({"term": term}))
        raise FencedError(
            f"nodes have heard a router of term {term}, this one has {self.term}: it was replaced, or router.json of "
            f"STATE_DIR={self.path} was lost; it ends, and the next one begins above that term"
        )

    def close(self) -> None:
        """Let another router have it."""
        with contextlib.suppress(FileNotFoundError):
            if self._url and self._url_path.read_text() == self._url:  # else another router has the folder
                self._url_path.unlink()
        self._lock.close()

    @property
    def _term_path(self) -> Path:
        return self.path / "router.json"

    @property
    def _url_path(self) -> Path:
        return self.path / "http.url"

    def _keepers(self) -> list[tuple[str, Callable[[], bool]]]:
        # The lock first: who has lost the folder to another router must not write into it.
        return [
            ("router.lock", self._lock.look_after),
            ("router.json", self._keep_term),
            ("http.url", self._keep_url),
        ]

    def _keep_term(self) -> bool:
        self.check_term()
        if self._term_path.exists():
            return False
        write_whole(self._term_path, json.dumps({"term": self.term}))
        self._seen = _identity(self._term_path)
        return True

    def _keep_url(self) -> bool:
        if not self._url or self._url_path.exists():
            return False
        write_whole(self._url_path, self._url)
        return True


def open_state_folder(path: Path) -> StateFolder:
    """Lock the folder and take the next term. Raises ConfigurationError if another router runs on it, or it cannot be
    written to."""
    lock = lock_folder(path, "router")
    try:
        return StateFolder(path, _next_term(path / "router.json"), lock)
    except ConfigurationError:
        lock.close()
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
