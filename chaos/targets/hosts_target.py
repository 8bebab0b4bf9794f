"""A mesh of local processes on played hosts: stages and experts in network namespaces, the router on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from chaos.target import Node, TargetError
from chaos.targets.local_target import LocalTarget, free_port
from chaos.targets.on_host import NAMESPACE_VARIABLE
from chaos.targets.played_hosts import PlayedHosts

_NODE = re.compile(r"(?:stage|expert)-(\d+)")


@dataclass(slots=True)
class HostsTarget(LocalTarget):
    """As LocalTarget, with links over TCP between `num_hosts` hosts, each of which can be lost.

    Stage and expert number n are on host n modulo `num_hosts`; each host has a state folder of its own, so that no
    two share Unix sockets.
    """

    num_hosts: int = 3
    features: frozenset[str] = field(default=frozenset({"processes", "hosts"}))
    hosts: PlayedHosts | None = None

    def __enter__(self) -> Self:
        self.hosts = PlayedHosts(self.num_hosts).__enter__()
        control = f"tcp://{self.hosts.own_address}:{free_port()}"
        self.settings = {**self.settings, "CONTROL": control, "ADVERTISE_HOST": self.hosts.own_address}
        services = ("stage", "expert")
        self.modules = {
            **self.modules,
            **{name: f"chaos.targets.on_host {self.modules.get(name, f'services.{name}')}" for name in services},
        }
        try:
            LocalTarget.__enter__(self)
        except TargetError:
            self.hosts.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            LocalTarget.__exit__(self, kind, error, trace)
        finally:
            if self.hosts is not None:
                self.hosts.__exit__(kind, error, trace)

    def nodes(self) -> list[Node]:
        return [replace(node, host=self._host_of(node.name)) for node in LocalTarget.nodes(self)]

    def places(self) -> Mapping[str, Mapping[str, str]]:
        """Settings of each node that a suite may ask for, by its name."""
        hosts = self.hosts
        if hosts is None or self.state_dir is None:
            return {}
        names = (f"{kind}-{number}" for kind in ("stage", "expert") for number in range(64))
        found: dict[str, Mapping[str, str]] = {}
        for name in names:
            number = _number(name) % self.num_hosts
            found[name] = {
                "HOST_LABEL": f"host-{number}",
                "STATE_DIR": str(self.state_dir / f"host-{number}"),
                "ADVERTISE_HOST": hosts.address(number),
                NAMESPACE_VARIABLE: hosts.namespace(number),
            }
        return found

    def _host_of(self, name: str) -> str:
        return str(_number(name) % self.num_hosts) if _NODE.fullmatch(name) else ""


def _number(name: str) -> int:
    found = _NODE.fullmatch(name)
    assert found is not None, f"{name} is a stage or an expert"
    return int(found[1])
