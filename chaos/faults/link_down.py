"""The node's network interfaces go down, and up again: for everybody, the clients of a router too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.target import Node, Target
from chaos.targets.host_commands import NetworkNamespace, missing
from chaos.undo import UndoList


class LinkDown:
    """All interfaces of each victim but loopback."""

    name = "link_down"
    needs = frozenset({"netns"})

    def __init__(self) -> None:
        self._undo = UndoList()

    def unavailable(self, target: Target) -> str:
        return missing("nsenter", "ip")

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            namespace = NetworkNamespace(victim.pid)
            # Routes through a gateway go with the link and do not come back with it.
            routes = [line.split() for line in namespace.run("ip", "route", "show").splitlines() if " via " in line]
            for interface in namespace.interfaces():
                self._undo.add(_bring_routes_back, namespace, routes)
                self._undo.add(namespace.run_if_there, "ip", "link", "set", interface, "up")
                namespace.run("ip", "link", "set", interface, "down")

    def heal(self, target: Target) -> None:
        self._undo.run()


def _bring_routes_back(namespace: NetworkNamespace, routes: Sequence[Sequence[str]]) -> None:
    for route in routes:
        namespace.run_if_there("ip", "route", "replace", *(word for word in route if word != "linkdown"))


def make_link_down(parameters: Mapping[str, Any]) -> LinkDown:
    """No parameters."""
    Parameters(parameters).done()
    return LinkDown()
