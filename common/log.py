"""The log of a process: one JSON line per event on stderr, with the service's name in each.

A module that logs has a logger of its own: `log = structlog.get_logger(__name__)`. The lines may go to a file or pipe
that does not take them: a disk that hangs, a reader that has stopped. So a thread of its own writes them, and only that
one waits.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

import structlog


def configure_log(service: str, level: str, stream: TextIO | LogStream | None = None) -> structlog.stdlib.BoundLogger:
    """Sets up logging of this process; returns a logger of its own. A level that does not exist is taken for `info`:
    the settings that are read next name it. `stream`: instead of stderr."""
    threshold = logging.getLevelNamesMapping().get(level.strip().upper(), logging.INFO)
    file: Any = sys.stderr if stream is None else stream
    logging.basicConfig(stream=file, level=logging.WARNING, format="%(message)s")

    def name_service(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {"service": service, **event}

    structlog.configure(
        processors=[
            name_service,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=file),
        cache_logger_on_first_use=True,
    )
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    return logger


MAX_LINES = 10_000
"""Lines that come while this many wait are counted and dropped."""


class LogStream:
    """What a logger needs of a file. `write` never waits."""

    def __init__(self, write: Callable[[str], object]) -> None:
        """`write` may wait as long as it likes, and raise OSError."""
        self._write = write
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._num_dropped = 0
        self._writer_pid = 0
        """The process that the thread runs in: it begins with the first line, and a fork has none of its own."""

    def write(self, text: str) -> int:
        """Hands in a line with its end."""
        if self._writer_pid != os.getpid() and not self._begin():
            self._try(text)
        elif self._lines.qsize() < MAX_LINES:
            self._lines.put(text)
        else:
            self._num_dropped += 1
        return len(text)

    def flush(self) -> None:
        """The thread does that after each line."""

    def drain(self, within_s: float) -> bool:
        """Waits until everything that was handed in is written; False if it is not in that time."""
        if self._writer_pid != os.getpid():
            return True  # nothing was
        is_written = threading.Event()
        self._lines.put(is_written)
        return is_written.wait(within_s)

    def _begin(self) -> bool:
        """Begins a thread. False where there may be none: then each caller writes its own lines, and waits."""
        lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()  # what a fork inherits is its parent's
        try:
            threading.Thread(target=self._run, args=(lines,), name="log", daemon=True).start()
        except RuntimeError:
            return False
        self._lines, self._writer_pid = lines, os.getpid()
        return True

    def _run(self, waiting: queue.SimpleQueue[str | threading.Event]) -> None:
        while True:
            lines = [waiting.get()]
            while not waiting.empty():
                lines.append(waiting.get())
            text = "".join(line for line in lines if isinstance(line, str))
            if self._num_dropped and text:
                number, self._num_dropped = self._num_dropped, 0
                text += json.dumps({"event": "log_lines_dropped", "level": "warning", "number": number}) + "\n"
            self._try(text)
            for line in lines:
                if isinstance(line, threading.Event):
                    line.set()

    def _try(self, text: str) -> None:
        try:
            if text:
                self._write(text)
        except OSError:
            return  # it has no reader any more, or the disk is full: there is nowhere to say so


def unbuffered(stream: TextIO) -> Callable[[str], object]:
    """Writes to a stream past its buffer, whose lock would be held while the disk is waited for."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # a stand-in without a file
        return stream.write

    def write(text: str) -> None:
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        while data:
            data = data[os.write(descriptor, data) :]

    return write
