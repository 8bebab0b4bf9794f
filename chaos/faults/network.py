"""How faults of networks are put on and taken off: by rules of the proxy, or in the network namespaces of nodes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from chaos.faults.base import Fault
from chaos.proxy.link_proxy import link_proxy
from chaos.proxy.link_rules import LinkRule
from chaos.target import Node, Target, TargetError
from chaos.targets.host_commands import NetworkNamespace, missing, run
from chaos.undo import UndoList


class ProxyFault(Fault):
    """A fault that is a set of rules for the proxy through which the links of the mesh lead."""

    needs: ClassVar[frozenset[str]] = frozenset({"proxy"})

    @abstractmethod
    def rules(self, target: Target, victims: Sequence[Node]) -> list[LinkRule]:
        """Returns what happens to the bytes of which links. Raises TargetError where that cannot be said."""

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        proxy, rules = link_proxy(target), self.rules(target, victims)
        self._undo.add(proxy.remove, rules)
        proxy.add(rules)


class NetworkFault(ProxyFault):
    """A fault that is put on in the network namespaces of nodes, or by the proxy where nodes have none."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def apply_in_namespaces(self, target: Target, victims: Sequence[Node]) -> None:
        """Does what `rules` do with the programs of this machine. Raises TargetError."""

    def uses_proxy(self, target: Target) -> bool:
        """Returns whether it is done by the proxy."""
        return "netns" not in target.features

    def unavailable(self, target: Target) -> str:
        if not target.features & {"netns", "proxy"}:
            return f"{self.name} needs network namespaces or links through a proxy"
        return "" if self.uses_proxy(target) else missing(*self.programs)

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        if self.uses_proxy(target):
            super().apply(target, victims)
        else:
            self.apply_in_namespaces(target, victims)


def add_packet_rule(namespace: NetworkNamespace, undo: UndoList, chain: str, *rule: str) -> None:
    """Puts a rule first in a chain of a node's packet filter; undoing takes it out if the namespace is still there."""
    namespace.run("iptables", "-w", "-I", chain, "1", *rule)
    undo.add(namespace.run_if_there, "iptables", "-w", "-D", chain, *rule)


def replace_discipline(namespace: NetworkNamespace, undo: UndoList, *discipline: str) -> None:
    """Has all interfaces of a node but loopback send by another queue discipline, until it is undone.

    A discipline that was set before is not known and not put back.
    """
    for interface in namespace.interfaces():
        namespace.run("tc", "qdisc", "replace", "dev", interface, "root", *discipline)
        undo.add(namespace.run_if_there, "tc", "qdisc", "del", "dev", interface, "root")


def has_netem() -> bool:
    """Returns whether this kernel can delay packets; that is tried in a namespace which ends with the trial."""
    try:
        run(["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"])
    except TargetError:
        return False
    return True
