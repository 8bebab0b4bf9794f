"""The loop that stage and expert nodes share: wait, hear the router, work, tell what was done, leave when asked to."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Generic

import zmq

from common.errors import LIFE_ENDING_ERRORS, MoemeshError
from common.messages import ExpertHeartbeat, Header, Message, StageHeartbeat
from common.node.process import DataSocket, NodeProcess

POLL_MS = 50
"""The longest that a loop waits for its sockets."""
CONTROL_INTERVAL_S = 0.01
"""How often the control link is looked after while nothing has come over it: its times are longer by far."""
LEAVE_DEADLINE_S = 15.0
"""How long a node that has to stop waits for the router to let it go."""


class NodeLoop(ABC, Generic[DataSocket]):
    """The loop of one node. A service says what it waits for, what it does in a turn, and what it tells the router."""

    def __init__(self, node: NodeProcess[DataSocket], clock: Callable[[], float] = time.monotonic) -> None:
        self._node: NodeProcess[DataSocket] = node
        self._control = node.control
        self._log = node.log
        self._clock = clock
        self._poller = zmq.Poller()
        self._polled_at_change = -1
        """The transport's `num_changes` when the poller was made."""
        self._next_control_s = 0.0

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serves until `should_stop` says so and the router lets the node go.

        Raises the router's refusal of this node, and DeadlineError where a load hangs.
        """
        leave_by_s: float | None = None
        while not self._control.leave_acknowledged or self._has_to_finish:
            now_s = self._clock()
            if should_stop():
                leave_by_s = leave_by_s or self._begin_leaving(now_s)
                if now_s >= leave_by_s or not self._control.registered:
                    break
            if self._node.transport.num_changes != self._polled_at_change:
                self._watch_sockets()
            ready = self._poller.poll(self._wait_ms(now_s))
            now_s = self._clock()
            link = self._control.socket
            if now_s >= self._next_control_s or any(socket in (link.raw, link.monitor) for socket, _ in ready):
                self._next_control_s = now_s + CONTROL_INTERVAL_S
                self._receive_control(now_s)
            self._work(now_s)
            self._control.beat(now_s, self._load)

    @property
    def _has_to_finish(self) -> bool:
        """Returns whether there is work that the node ends also after the router has let it go."""
        return False

    @abstractmethod
    def _sockets(self) -> Iterable[zmq.Socket[bytes] | int | None]:
        """Returns what the loop waits for besides the router: sockets and descriptors."""

    @abstractmethod
    def _wait_ms(self, now_s: float) -> int:
        """Returns how long there is nothing to do unless a socket says something, POLL_MS at most."""

    @abstractmethod
    def _obey(self, message: Message, header: Header, now_s: float) -> None:
        """Does what the router asks. The router is told of any MoemeshError that it raises."""

    @abstractmethod
    def _work(self, now_s: float) -> None:
        """Takes one turn of the node's own work."""

    @abstractmethod
    def _load(self) -> StageHeartbeat | ExpertHeartbeat:
        """Returns what a heartbeat says."""

    def _watch_sockets(self) -> None:
        self._polled_at_change = self._node.transport.num_changes
        self._poller = zmq.Poller()
        for socket in (self._control.socket.raw, self._control.socket.monitor, *self._sockets()):
            if socket is not None:
                self._poller.register(socket, zmq.POLLIN)

    def _begin_leaving(self, now_s: float) -> float:
        self._log.info("leaving")
        self._control.leave("stopped")
        return now_s + LEAVE_DEADLINE_S

    def _receive_control(self, now_s: float) -> None:
        for message, header in self._control.receive(now_s):
            try:
                self._obey(message, header, now_s)
            except LIFE_ENDING_ERRORS:
                raise
            except MoemeshError as error:
                self._log.error("control_message_refused", kind=type(message).__name__, reason=str(error))
                self._control.fail(error, header)
