"""In this thread a node reads its checkpoint. A disk that hangs there holds up neither the node's loop nor its end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class LoaderThread:
    """Does one thing after another."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._in_hand: deque[Future[Any]] = deque()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Do this after what was submitted before."""
        future: Future[Result] = Future()
        self._drop_done()
        self._in_hand.append(future)
        self._tasks.put(_Task(future, work, arguments))
        if self._thread is None:
            # A daemon: the interpreter does not wait for it when the process ends.
            self._thread = threading.Thread(target=self._run, name="load", daemon=True)
            self._thread.start()
        return future

    def close(self) -> None:
        """Give up what has not begun, and do not wait for what has."""
        for future in self._in_hand:
            future.cancel()
        self._tasks.put(None)

    def _drop_done(self) -> None:
        while self._in_hand and self._in_hand[0].done():
            self._in_hand.popleft()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.run()
            del task  # with its result, which may be gigabytes


class _Task:
    def __init__(self, future: Future[Any], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._future = future
        self._work = work
        self._arguments = arguments

    def run(self) -> None:
        if not self._future.set_running_or_notify_cancel():
            return
        try:
            result = self._work(*self._arguments)
        except BaseException as error:  # whoever asks for the result gets it
            self._future.set_exception(error)
        else:
            self._future.set_result(result)
