"""What the harness asks of a mesh that it may hurt: who runs there, and the few things that can be done to them.

Two targets fill this: processes under the supervisor of `make run`, and containers by compose label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

NODE_KINDS = ("router", "stage", "expert")


@dataclass(frozen=True, slots=True)
class Node:
    """One process of the mesh as it runs now. A restart makes another `pid`, the name stays."""

    name: str
    """`stage-0` or the container's name; unique in the mesh."""
    kind: str
    """One of NODE_KINDS."""
    pid: int
    """On the host; of the process itself, not of an init above it."""
    container: str = ""
    """Container id; empty on the local target."""
    host: str = ""
    """Which played host it runs on; empty where none are played, and for who runs beside them."""


class Target(Protocol):
    """A mesh that can be hurt. Every call raises `TargetError` with a sentence when it cannot be done."""

    @property
    def url(self) -> str:
        """Base URL of the public HTTP API; the same over restarts of the router."""
        ...

    @property
    def features(self) -> frozenset[str]:
        """What this target allows, by word.

        `processes`: signals. `containers`: docker API and cgroups. `netns`: a network namespace of its own for each
        node (iptables, tc). `proxy`: links that go over TCP and can be led through one. `hosts`: hosts that can
        be lost.
        """
        ...

    def nodes(self) -> list[Node]:
        """Everybody who runs now, by name."""
        ...

    def signal(self, node: Node, number: int) -> None:
        """Send a signal from the host; a process that is gone already is no error."""
        ...

    def stop(self, node: Node, timeout_s: float) -> None:
        """End it in an orderly way (SIGTERM, then SIGKILL after the timeout) and leave it ended."""
        ...

    def start(self, name: str) -> None:
        """Bring a stopped node back, as a new process of the same name."""
        ...

    def scale(self, kind: str, count: int) -> None:
        """Have so many processes of a kind (stage, expert); new ones get new names, the newest end first."""
        ...


class TargetError(Exception):
    """The target cannot do what was asked; the sentence names the node and what would be right."""
