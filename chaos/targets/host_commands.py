"""Programs of this machine that hurt: iptables, tc, ip, in the network namespace of another process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from chaos.target import TargetError

COMMAND_TIMEOUT_S = 20.0


def run(
    words: Sequence[str], environment: Mapping[str, str] | None = None, timeout_s: float = COMMAND_TIMEOUT_S
) -> str:
    """Runs a program and returns its output. Raises TargetError with what it said."""
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise TargetError(f"{words[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise TargetError(f"{' '.join(words)}: no end after {timeout_s:.0f} s") from None
    if done.returncode != 0:
        raise TargetError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def missing(*programs: str) -> str:
    """Returns what keeps this process from running these programs in another's namespace, or "" if nothing does."""
    if os.geteuid() != 0:
        return "only root may enter a node's network namespace"
    absent = [program for program in programs if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


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
