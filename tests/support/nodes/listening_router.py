"""The router's end of a node's control link, for tests of what the node says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from common.errors import MoemeshError
from common.messages import Header, Hello, Leave, Message, Welcome
from tests.support.nodes.memory_transport import MemorySocket

HELLO = Hello("node-1", 1, "stage", 0, "", "cpu", "print", (), (), "")
"""Of a node that holds nothing."""


class ListeningRouter:
    """Stands in for a `ControlLink`: keeps what is said, and hands out what a test puts into `asked`."""

    def __init__(self) -> None:
        self.router_term = 0
        self.registered = True
        self.leave_acknowledged = False
        self.settings = Welcome(250, "float32", "exact", 32, 1, 1000)
        self.socket = MemorySocket("control", "tcp://router:1")
        self.asked: deque[tuple[Message, Header]] = deque()
        self.sent: list[Message] = []
        self.last_header = Header()
        """Of what was sent last."""
        self.failures: list[str] = []
        self.add_held: Callable[[Hello], Hello] = lambda hello: hello

    def receive(self, now_s: float) -> list[tuple[Message, Header]]:
        asked = list(self.asked)
        self.asked.clear()
        return asked

    def send(self, message: Message, header: Header | None = None) -> bool:
        self.sent.append(message)
        self.last_header = header or Header()
        return True

    def fail(self, error: MoemeshError, header: Header | None = None) -> None:
        self.failures.append(error.message)

    def beat(self, now_s: float, load: Callable[[], Message]) -> None:
        return None

    def leave(self, reason: str) -> None:
        self.sent.append(Leave(reason))
