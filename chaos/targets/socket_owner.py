"""Which process owns a TCP socket of this machine, from /proc."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path


def inodes_of_port(table: str, port: int) -> set[int]:
    """Inodes of the sockets whose local port it is, from the text of /proc/net/tcp. 0 is a socket without owner."""
    rows = (line.split() for line in table.splitlines()[1:])
    return {int(row[9]) for row in rows if int(row[1].rpartition(":")[2], 16) == port} - {0}


class SocketOwners:
    """Names the node behind a loopback address. `pids`: name -> pid of those who may own sockets, now."""

    def __init__(self, pids: Callable[[], Mapping[str, int]], proc: Path = Path("/proc")) -> None:
        self._pids = pids
        self._proc = proc

    def __call__(self, host: str, port: int) -> str:
        """The node's name; empty if it is none of them. Where both ends of a connection have one port, the first."""
        inodes = inodes_of_port((self._proc / "net/tcp").read_text(), port)
        for name, pid in self._pids().items():
            if not inodes.isdisjoint(self._inodes_of_process(pid)):
                return name
        return ""

    def _inodes_of_process(self, pid: int) -> Iterator[int]:
        folder = self._proc / str(pid) / "fd"
        try:
            names = os.listdir(folder)
        except OSError:
            return  # it has ended, or is not ours to look into
        for name in names:
            try:
                link = os.readlink(folder / name)
            except OSError:
                continue  # closed since
            if link.startswith("socket:["):
                yield int(link[8:-1])
