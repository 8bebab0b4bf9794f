"""The files of the Unix sockets that a process listens on: looked after, and made again where they were removed.

A socket whose file is gone keeps its connections and gets no new ones: this goes unnoticed until the next process wants
to connect. So a process that has bound one looks now and then whether its path still leads to it.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

LOOK_INTERVAL_S = 0.5
MAX_LOOK_INTERVAL_S = 8.0
"""The pause between looks at a file that is lost again and again: each costs a descriptor."""
STEADY_S = 60.0
"""A file that has stood for this long is looked at often again."""


class SocketFile:
    """One path that a socket of this process is bound to."""

    def __init__(self, name: str, path: Path, bind: Callable[[], None]) -> None:
        """`path` leads to the socket now. `bind` makes it lead there again, and raises OSError."""
        self.name = name
        self.path = path
        self._bind = bind
        self._identity = _identity(path)
        self._interval_s = LOOK_INTERVAL_S
        self._next_look_s = 0.0
        self._lost_s: float | None = None
        self._failure = ""

    def is_due(self, now_s: float) -> bool:
        """Returns whether it is time for a look."""
        return now_s >= self._next_look_s

    def look(self, now_s: float, *, at_once: bool = False) -> bool:
        """Make it again where it is gone, or where there is something else without a listener; True if it had to be.

        Nothing is done where it is not yet time for a look. A file that another process listens on is left to that one,
        which is a failure; the same one is logged once.
        """
        if not at_once and not self.is_due(now_s):
            return False
        if _identity(self.path) == self._identity:
            if self._lost_s is not None and now_s - self._lost_s >= STEADY_S:
                self._lost_s, self._interval_s = None, LOOK_INTERVAL_S
            self._next_look_s = now_s + self._interval_s
            return False
        if self._lost_s is not None:
            self._interval_s = min(MAX_LOOK_INTERVAL_S, self._interval_s * 2)
        self._lost_s = now_s
        self._next_look_s = now_s + self._interval_s
        failure = self._make_again()
        if not failure:
            log.warning("socket_file_made_again", socket=self.name, path=str(self.path), reason="it was gone")
        elif failure != self._failure:
            log.error("socket_file_lost", socket=self.name, path=str(self.path), reason=failure)
        self._failure = failure
        return not failure

    def remove(self) -> None:
        """Leave nothing behind; what others have put there is theirs. Raises OSError."""
        if self._identity is not None and _identity(self.path) == self._identity:
            self.path.unlink(missing_ok=True)

    def _make_again(self) -> str:
        try:
            if _is_listened_on(self.path):
                return "another process listens there"
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._bind()
        except OSError as error:
            return str(error)
        self._identity = _identity(self.path)
        return ""


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_listened_on(path: Path) -> bool:
    """Returns whether a connection to the path finds a listener; a full backlog counts as one. Raises OSError where
    there is no socket to ask with."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


class DiskCanary:
    """Touches a folder before a thread that must not wait for its disk: a thread of its own hangs there instead."""

    def __init__(self, touch: Callable[[], object]) -> None:
        """`touch` waits for the disk."""
        self._touch = touch
        self._asking: threading.Thread | None = None

    def lives(self, within_s: float) -> bool:
        """Returns whether the disk answers in that time. One that did not is not waited for again until it has. False,
        too, where it cannot be asked."""
        if self._asking is None:
            asking = threading.Thread(target=self._touch, name="canary", daemon=True)
            try:
                asking.start()
            except RuntimeError:
                return False  # this process may not have one more thread now; the next look is soon
            self._asking = asking
            asking.join(within_s)
        if self._asking.is_alive():
            return False
        self._asking = None
        return True
