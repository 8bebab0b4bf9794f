"""A mesh of local processes on played hosts: stages and experts in network namespaces, the router on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from chaos.target import Node
from chaos.targets.local_target import LocalTarget, free_port
from chaos.targets.on_host import NAMESPACE_VARIABLE
from chaos.targets.played_hosts import PlayedHosts

SERVICES = ("stage", "expert")
MAX_NODES_OF_A_KIND = 64
_NODE = re.compile(r"(?:stage|expert)-(\d+)")


@dataclass
class HostsTarget(LocalTarget):
    """As LocalTarget, but with links over TCP between `num_hosts` hosts, each of which can be lost.

    Stage and expert number n are on host n modulo `num_hosts`; each host has a state folder of its own, so that no
    two share Unix sockets.
    """

    num_hosts: int = 3
    features: frozenset[str] = field(default=frozenset({"processes", "hosts"}))
    hosts: PlayedHosts | None = None

    def enter_surroundings(self, stack: ExitStack) -> Mapping[str, str]:
        self.hosts = stack.enter_context(PlayedHosts(self.num_hosts))
        address = self.hosts.own_address
        return {"CONTROL": f"tcp://{address}:{free_port()}", "ADVERTISE_HOST": address}

    def modules_run(self) -> Mapping[str, str]:
        modules = {service: self.modules.get(service, f"services.{service}") for service in SERVICES}
        return {**self.modules, **{name: f"chaos.targets.on_host {module}" for name, module in modules.items()}}

    def places(self) -> Mapping[str, Mapping[str, str]]:
        names = (f"{service}-{number}" for service in SERVICES for number in range(MAX_NODES_OF_A_KIND))
        return {name: self._place(int(self._host_of(name))) for name in names}

    def nodes(self) -> list[Node]:
        return [replace(node, host=self._host_of(node.name)) for node in super().nodes()]

    def _place(self, number: int) -> Mapping[str, str]:
        assert self.hosts is not None, "places are asked for while the mesh is started"
        assert self.state_dir is not None, "places are asked for while the mesh is started"
        return {
            "HOST_LABEL": f"host-{number}",
            "STATE_DIR": str(self.state_dir / f"host-{number}"),
            "ADVERTISE_HOST": self.hosts.address(number),
            NAMESPACE_VARIABLE: self.hosts.namespace(number),
        }

    def _host_of(self, name: str) -> str:
        found = _NODE.fullmatch(name)
        return str(int(found[1]) % self.num_hosts) if found else ""
