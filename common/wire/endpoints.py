"""Which address of a peer to use: ipc where both ends prove that they share a folder on one host, tcp otherwise."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigurationError

_MAX_IPC_PATH_BYTES = 107
"""sun_path of a Unix socket has 108 bytes, the last of them zero."""
_SEPARATOR = "\0"
"""The one character that no path has: a state folder may well have blanks in its name."""


def choose_endpoint(endpoints: Sequence[str], peer_ipc_token: str, own_ipc_token: str) -> str:
    """Returns the best of a peer's endpoints. Raises ConfigurationError when none can be reached from here."""
    same_host = share_folder(peer_ipc_token, own_ipc_token)
    for endpoint in endpoints:
        if endpoint.startswith("tcp://") or (endpoint.startswith("ipc://") and same_host):
            return endpoint
    raise ConfigurationError(
        f"no endpoint of {', '.join(endpoints) or '(none)'} can be reached: on another host a node must listen on tcp"
    )


def join_endpoints(endpoints: Sequence[str]) -> str:
    """Endpoints as one string, for a list of nodes that each have some."""
    return _SEPARATOR.join(endpoints)


def split_endpoints(joined: str) -> list[str]:
    """Returns what `join_endpoints` joined."""
    return joined.split(_SEPARATOR) if joined else []


def ipc_folder(state_dir: Path) -> Path:
    """Returns the folder for socket files of one mesh: in its state folder, or, where that path is too long, or is not
    UTF-8 as ZeroMQ's addresses must be, a short stand-in."""
    folder = state_dir.resolve() / "ipc"
    path = os.fsencode(folder)
    is_too_long = len(path) + len("/expert-0123456789abcdef-lifeline") > _MAX_IPC_PATH_BYTES
    if is_too_long or path.decode("utf-8", "replace") != str(folder):
        digest = hashlib.sha256(path).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"moemesh-{digest}"
    return folder


def remove_socket_files(folder: Path, node_id: str, endpoints: Sequence[str]) -> None:
    """Removes what a process that is gone leaves of its own in the mesh's folder. Raises OSError.

    Endpoints are what that node said: only sockets in this folder that bear its name are touched.
    """
    for endpoint in endpoints:
        path = Path(endpoint.removeprefix("ipc://"))
        is_own = endpoint.startswith("ipc://") and path.parent == folder and path.name.startswith(f"{node_id}-")
        if is_own and path.is_socket():
            path.unlink(missing_ok=True)


def ipc_token(folder: Path, mount_namespace: Path = Path("/proc/self/ns/mnt")) -> str:
    """Proofs that two processes see the same folder of the same running kernel; `share_folder` compares them.

    One is the folder itself, by device and inode: it holds also where a container has the folder under another path.
    The other is its path among the mounts of this process: it holds also after the folder was removed and made
    again. Empty where the system has no such thing.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    if not boot_id.exists():
        return ""
    status = folder.stat()
    proofs = [f"{status.st_dev}:{status.st_ino}"]
    with contextlib.suppress(OSError):  # a sandbox without it: the folder itself is proof enough until it is removed
        proofs.append(f"{os.readlink(mount_namespace)}:{folder.resolve()}")
    boot = boot_id.read_text().strip()
    return " ".join(hashlib.sha256(f"{boot}:{proof}".encode()).hexdigest()[:32] for proof in proofs)


def share_folder(token: str, other_token: str) -> bool:
    """Returns whether two processes with these tokens see the same folder: one proof in common is enough."""
    return not set(token.split()).isdisjoint(other_token.split())
