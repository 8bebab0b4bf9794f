"""A mesh of local processes whose links are TCP on the loopback, through the proxy, instead of Unix sockets."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from chaos.proxy.proxy import LinkProxy
from chaos.target import TargetError
from chaos.targets.local_target import LocalTarget, free_port
from chaos.targets.socket_owner import SocketOwners


@dataclass(slots=True)
class ProxiedLocalTarget(LocalTarget):
    """As LocalTarget, and links can be hurt. Slower by two hops of a Python program for each message."""

    features: frozenset[str] = field(default=frozenset({"processes", "proxy"}))
    proxy: LinkProxy | None = None

    def __enter__(self) -> Self:
        self.proxy = LinkProxy(SocketOwners(self._pids)).__enter__()
        links = {"CONTROL": f"tcp://127.0.0.1:{free_port()}", "SOCKS_PROXY": self.proxy.address}
        self.settings = {**self.settings, **links}
        try:
            LocalTarget.__enter__(self)
        except TargetError:
            self.proxy.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # The mesh first: it says goodbye through the proxy.
            LocalTarget.__exit__(self, kind, error, trace)
        finally:
            if self.proxy is not None:
                self.proxy.__exit__(kind, error, trace)

    def _pids(self) -> dict[str, int]:
        try:
            return {node.name: node.pid for node in self.nodes()}
        except TargetError:
            return {}  # the first process connects before the mesh is known here
