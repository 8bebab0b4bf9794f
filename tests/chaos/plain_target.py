"""Plain processes as a mesh: for faults that hurt a process and do not care what it does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from chaos.target import Node, TargetError

SPIN = "import time\nwhile True: time.sleep(0.01); sum(range(20000))"


@dataclass
class PlainTarget:
    """Nodes that are Python processes with a program each."""

    features: frozenset[str] = frozenset({"processes"})
    url: str = "http://127.0.0.1:9"
    processes: dict[str, tuple[str, subprocess.Popen[bytes]]] = field(default_factory=dict)

    def nodes(self) -> list[Node]:
        return [
            Node(name, kind, process.pid)
            for name, (kind, process) in sorted(self.processes.items())
            if process.poll() is None
        ]

    def signal(self, node: Node, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(node.pid, number)

    def stop(self, node: Node, timeout_s: float) -> None:
        raise TargetError("plain processes are not stopped, started or scaled")

    def start(self, name: str) -> None:
        raise TargetError("plain processes are not stopped, started or scaled")

    def scale(self, kind: str, count: int) -> None:
        raise TargetError("plain processes are not stopped, started or scaled")

    def run(self, name: str, kind: str, program: str, environment: Mapping[str, str], folder: Path) -> Node:
        """One more process."""
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", program],
            env={**os.environ, **environment},
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        self.processes[name] = (kind, process)
        return Node(name, kind, process.pid)


@contextmanager
def plain_target() -> Iterator[PlainTarget]:
    """Ends all processes."""
    target = PlainTarget()
    try:
        yield target
    finally:
        for _, process in target.processes.values():
            process.kill()
            process.wait()
