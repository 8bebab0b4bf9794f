"""What /proc says of a running process: its settings, its files as it sees them, and its children."""

from __future__ import annotations

from pathlib import Path

from chaos.target import Node, TargetError


def environment_of(node: Node) -> dict[str, str]:
    """Returns the environment that it was started with. Raises TargetError when it is gone or not ours to read."""
    try:
        entries = Path(f"/proc/{node.pid}/environ").read_bytes().split(b"\0")
    except OSError as error:
        raise TargetError(f"the environment of {node.name} cannot be read: {error.strerror}") from None
    pairs = [entry.decode(errors="replace").partition("=") for entry in entries if entry]
    return {name: value for name, _, value in pairs}


def path_seen_by(node: Node, path: str) -> Path:
    """Returns a path of the process (a relative one: to its folder) as this process reaches it, in containers too."""
    own = Path(f"/proc/{node.pid}")
    return own / "root" / path.lstrip("/") if path.startswith("/") else own / "cwd" / path


def state_folder(node: Node) -> Path:
    """Returns the folder in which the process keeps its state, as this process reaches it. Raises TargetError."""
    return path_seen_by(node, environment_of(node).get("STATE_DIR") or "state")


def children(pid: int) -> list[int]:
    """Returns the pids of a process's children, the newest last; none where it is gone or not ours to see."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Returns the pids of a process's children, their children and so on."""
    below = children(pid)
    return below + [descendant for child in below for descendant in descendants(child)]
