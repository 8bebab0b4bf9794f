"""An echo: whatever comes in over one connection goes back over it, on threads that do nothing else.

Whoever sends something learns how long this process takes to answer when its main thread computes, holds the
interpreter or waits: the loop that answers is libzmq's own (`zmq_proxy`), which runs without the interpreter, and its
context has an I/O thread to itself. What is silent here is stopped, cut off, or on a host that has no time for it.
"""

from __future__ import annotations

import threading

import zmq


class Echo:
    """Runs from its making until `close`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], raw: zmq.Socket[bytes], endpoint: str) -> None:
        """`context` has no other socket; both belong to the echo from now on."""
        self.endpoint = endpoint
        self._context = context
        self._raw = raw
        self._thread = threading.Thread(target=self._run, name="echo", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it; returns when it has ended."""
        self._context.term()  # waits for the socket, which only the thread may close
        self._thread.join()

    def _run(self) -> None:
        try:
            zmq.proxy(self._raw, self._raw)
        except zmq.ContextTerminated:
            return
        finally:
            self._raw.close(linger=0)
