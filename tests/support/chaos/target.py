"""A mesh that is a list of names: it writes down what is done to it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from chaos.target import Node, TargetError


@dataclass
class ListedTarget:
    """Each start gives a new pid. Thread-safe, as faults work in threads."""

    url: str = "http://127.0.0.1:9"
    features: frozenset[str] = frozenset({"processes"})
    done: list[tuple[str, str, float]] = field(default_factory=list)
    """(what, name, number) in order."""
    running: dict[str, Node] = field(default_factory=dict)
    _next_pid: int = 1000
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for name in ("router-0", "stage-0", "stage-1", "expert-0", "expert-1"):
            self._run(name)

    def nodes(self) -> list[Node]:
        with self._lock:
            return sorted(self.running.values(), key=lambda node: node.name)

    def named(self, *names: str) -> list[Node]:
        return [node for node in self.nodes() if node.name in names]

    def signal(self, node: Node, number: int) -> None:
        self.done.append(("signal", node.name, number))

    def stop(self, node: Node, timeout_s: float) -> None:
        self.done.append(("stop", node.name, timeout_s))
        with self._lock:
            del self.running[node.name]

    def start(self, name: str) -> None:
        self.done.append(("start", name, 0))
        if name not in self.running:
            self._run(name)

    def scale(self, kind: str, count: int) -> None:
        self.done.append(("scale", kind, count))
        if kind == "router":
            raise TargetError("a mesh has one router")

    def _run(self, name: str) -> None:
        with self._lock:
            self._next_pid += 1
            self.running[name] = Node(name, name.split("-")[0], self._next_pid)
