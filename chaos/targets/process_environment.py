"""The settings that a running process was started with, and its files as it sees them, from /proc."""

from __future__ import annotations

from pathlib import Path

from chaos.target import Node, TargetError


def environment_of(node: Node, proc: Path = Path("/proc")) -> dict[str, str]:
    """Its environment at start. Raises TargetError when it is gone or not ours to read."""
    try:
        entries = (proc / f"{node.pid}/environ").read_bytes().split(b"\0")
    except OSError as error:
        raise TargetError(f"the environment of {node.name} cannot be read: {error.strerror}") from None
    pairs = [entry.decode(errors="replace").partition("=") for entry in entries if entry]
    return {name: value for name, _, value in pairs}


def path_seen_by(node: Node, path: str, proc: Path = Path("/proc")) -> Path:
    """A path of the process (relative ones: to its folder) as this process reaches it, inside containers too."""
    own = proc / str(node.pid)
    return own / "root" / path.lstrip("/") if path.startswith("/") else own / "cwd" / path
