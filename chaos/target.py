"""What the harness asks of a mesh that it may hurt: which processes run there, and what can be done to them.

Two targets do it: processes under the supervisor of `make run`, and containers by compose label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

NodeKind = Literal["router", "stage", "expert"]
NODE_KINDS = get_args(NodeKind)


@dataclass(frozen=True, slots=True)
class Node:
    """One process of the mesh as it runs now. A restart makes another `pid`, the name stays."""

    name: str
    """It is `stage-0` or the container's name, and unique in the mesh."""
    kind: str
    """One of NODE_KINDS."""
    pid: int
    """The process itself has it on the host, not an init above it."""
    container: str = ""
    """The id of the container; empty on the local target."""
    host: str = ""
    """The played host that it runs on; empty where none are played, and for what runs beside them."""


class Target(Protocol):
    """A mesh that can be hurt. Every call raises `TargetError` with a sentence when it cannot be done."""

    @property
    def url(self) -> str:
        """The base URL of the public HTTP API; it is the same over restarts of the router."""

    @property
    def features(self) -> frozenset[str]:
        """What this target allows.

        `processes`: signals. `containers`: docker API and cgroups. `netns`: a network namespace of its own for each
        node (iptables, tc). `proxy`: links that go over TCP and can be led through one. `hosts`: hosts that can
        be lost.
        """

    def nodes(self) -> list[Node]:
        """Returns all processes that run now, by name."""

    def signal(self, node: Node, number: int) -> None:
        """Sends a signal from the host; a process that is gone already is not an error."""

    def stop(self, node: Node, timeout_s: float) -> None:
        """Ends it in an orderly way (SIGTERM, then SIGKILL after the timeout) and leaves it ended."""

    def start(self, name: str) -> None:
        """Brings a stopped node back, as a new process of the same name."""

    def scale(self, kind: str, count: int) -> None:
        """Starts or ends processes of a kind (stage, expert) until there are `count`; the newest end first."""


class TargetError(Exception):
    """The target cannot do what was asked; the sentence names the node and what would be right."""
