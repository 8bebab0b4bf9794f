"""What each node is for at the moment of a fault, by the router's own account. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chaos.target import Node

ROLES = ("holder", "mirror", "expert", "spare")
"""A `holder` has a pipeline slot, a `mirror` copies one, an `expert` has shards; nothing depends on a `spare`."""
CONTAINER_NAME_LENGTH = 12
"""A container calls itself by this many characters of its id, unless it was named."""


@dataclass(frozen=True, slots=True)
class Role:
    """The role of one node."""

    word: str
    """One of ROLES."""
    place: str = ""
    """The slot that it holds or copies, for people."""

    def __str__(self) -> str:
        return f"{self.word} of {self.place}" if self.place else self.word


def read_roles(document: Any, nodes: Sequence[Node]) -> dict[str, Role]:
    """Reads the answer to GET /mesh and returns roles by the name of the node. Of another document there are none."""
    entries = document.get("nodes") if isinstance(document, Mapping) else None
    found: dict[str, Role] = {}
    for entry in entries if isinstance(entries, list) else ():
        node = _find(str(entry.get("process", "")), nodes) if isinstance(entry, Mapping) else None
        if node is not None and entry.get("role") in ROLES:
            found[node.name] = Role(entry["role"], _place(entry.get("slot")))
    return found


def _find(process: str, nodes: Sequence[Node]) -> Node | None:
    """Returns the node that calls itself HOST/PID: by pid where it sees the host's pids, else by its container."""
    host, _, pid = process.rpartition("/")
    for node in nodes:
        if node.container:
            if host and host == node.container[:CONTAINER_NAME_LENGTH]:
                return node
        elif pid == str(node.pid):
            return node
    return None


def _place(slot: Any) -> str:
    if isinstance(slot, Mapping) and {"pipeline", "index"} <= slot.keys():
        return f"{slot['pipeline']}/{slot['index']}"
    return ""
