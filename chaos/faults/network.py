"""How faults of networks are put on and taken off: by rules of the proxy, or in the network namespaces of nodes."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from chaos.faults.base import Fault, UndoList
from chaos.proxy.link_proxy import link_proxy
from chaos.proxy.link_rules import LinkRule
from chaos.target import Node, Target, TargetError
from chaos.targets.host_commands import missing, run


class NetworkNamespace:
    """The network as one process sees it. Holds the namespace's identity, so that a reused pid is never hurt."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.identity = _identity(pid)
        if not self.identity:
            raise TargetError(f"process {pid} is gone")

    @property
    def exists(self) -> bool:
        """It is true while the process lives in it."""
        return _identity(self.pid) == self.identity

    def run(self, *words: str) -> str:
        """Runs a program in it and returns its output. Raises TargetError, also for the harness's own namespace."""
        if self.identity == _identity(os.getpid()):
            raise TargetError(f"process {self.pid} has no network namespace of its own")
        return run(["nsenter", "-t", str(self.pid), "-n", *words])

    def run_if_there(self, *words: str) -> str:
        """Runs a program that undoes something, unless the process and with it the namespace have gone."""
        return self.run(*words) if self.exists else ""

    def addresses(self) -> tuple[str, ...]:
        """Returns its IPv4 addresses, without loopback."""
        links = self._show("-4", "address", "show")
        return tuple(str(entry["local"]) for link in links if not _is_loopback(link) for entry in link["addr_info"])

    def interfaces(self) -> tuple[str, ...]:
        """Returns the names of its interfaces, without loopback."""
        return tuple(str(link["ifname"]) for link in self._show("link", "show") if not _is_loopback(link))

    def _show(self, *words: str) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = json.loads(self.run("ip", "-j", *words) or "[]")
        return [link for link in shown if link]


def _is_loopback(link: Mapping[str, Any]) -> bool:
    return "LOOPBACK" in link["flags"]


def _identity(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


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
