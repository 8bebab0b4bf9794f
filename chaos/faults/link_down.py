"""The network interfaces of a node go down, and up again: for all peers, the clients of a router too."""

from __future__ import annotations

from collections.abc import Sequence

from chaos.faults.base import Fault
from chaos.faults.network import NetworkNamespace
from chaos.target import Node, Target


class LinkDown(Fault):
    """All interfaces of each victim but loopback go down."""

    name = "link_down"
    needs = frozenset({"netns"})
    programs = ("nsenter", "ip")

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            namespace = NetworkNamespace(victim.pid)
            # Routes through a gateway go with the link and do not come back with it.
            routes = [line.split() for line in namespace.run("ip", "route", "show").splitlines() if " via " in line]
            for interface in namespace.interfaces():
                self._undo.add(_bring_routes_back, namespace, routes)
                self._undo.add(namespace.run_if_there, "ip", "link", "set", interface, "up")
                namespace.run("ip", "link", "set", interface, "down")


def _bring_routes_back(namespace: NetworkNamespace, routes: Sequence[Sequence[str]]) -> None:
    for route in routes:
        namespace.run_if_there("ip", "route", "replace", *(word for word in route if word != "linkdown"))
