"""Who is behind an address of a compose network, for the proxy: containers keep name and address over restarts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ContainerAddress:
    """One container of the mesh."""

    name: str
    service: str
    """As other containers say its name."""
    addresses: tuple[str, ...]


@dataclass(slots=True)
class ContainerNames:
    """Looked up again only for what is not known: asking the engine takes long for a link that comes up."""

    look_up: Callable[[], Sequence[ContainerAddress]]
    _known: list[ContainerAddress] = field(default_factory=list)

    def name_at(self, host: str, port: int) -> str:
        """The container's name; empty if there is none at this address."""
        return next((entry.name for entry in self._matching(lambda entry: host in entry.addresses)), "")

    def address_of(self, host: str) -> str:
        """The address that a service's name stands for; other names and addresses stay as they are."""
        if host.replace(".", "").isdigit():
            return host
        found = self._matching(lambda entry: entry.service == host and bool(entry.addresses))
        return found[0].addresses[0] if found else host

    def _matching(self, fits: Callable[[ContainerAddress], bool]) -> list[ContainerAddress]:
        found = [entry for entry in self._known if fits(entry)]
        if not found:
            self._known = list(self.look_up())
            found = [entry for entry in self._known if fits(entry)]
        return found
