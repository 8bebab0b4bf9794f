"""What each node is for at the moment of a fault, from the router's own account of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chaos.target import Node

ROLES = ("holder", "mirror", "expert", "spare")
"""`holder` of a pipeline slot; `mirror` of one; `expert` with shards; `spare`: nothing depends on it."""
CONTAINER_NAME_LENGTH = 12
"""A container calls itself by so much of its id, unless somebody has named it."""


@dataclass(frozen=True, slots=True)
class Role:
    """Of one node."""

    word: str
    """One of ROLES."""
    place: str = ""
    """The slot, for people."""

    def __str__(self) -> str:
        return f"{self.word} of {self.place}" if self.place else self.word


def read_roles(document: Any, nodes: Sequence[Node]) -> dict[str, Role]:
    """By the name of the node. `document`: the answer to GET /mesh, or anything else: then nobody's role is known."""
    entries = document.get("nodes") if isinstance(document, Mapping) else None
    found: dict[str, Role] = {}
    for entry in entries if isinstance(entries, list) else ():
        node = _find(str(entry.get("process", "")), nodes) if isinstance(entry, Mapping) else None
        if node is not None and entry.get("role") in ROLES:
            found[node.name] = Role(entry["role"], _place(entry.get("slot")))
    return found


def _find(process: str, nodes: Sequence[Node]) -> Node | None:
    """The node that calls itself HOST/PID: by pid where it sees the host's pids, else by its container."""
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
