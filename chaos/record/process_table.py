"""What the kernel says of a process: memory, open files, sockets. Linux only; elsewhere there is nothing to say."""

from __future__ import annotations

import os
from pathlib import Path

from chaos.record.history import ProcessSample
from chaos.target import Node

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def sample_process(node: Node, at_s: float) -> ProcessSample | None:
    """None where the process is gone, is not ours to see, or there is no /proc."""
    folder = Path(f"/proc/{node.pid}")
    try:
        resident_pages = int((folder / "statm").read_text().split()[1])
        links = [_link(descriptor) for descriptor in (folder / "fd").iterdir()]
    except OSError:
        return None
    num_sockets = sum(link.startswith("socket:") for link in links)
    return ProcessSample(
        at_s, node.name, node.kind, node.pid, resident_pages * _PAGE_BYTES, len(links) - num_sockets, num_sockets
    )


def _link(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except FileNotFoundError:
        return ""  # closed since the folder was read
