"""The rings of a mesh's processes as /proc shows them: where they are mapped, what state their slots are in, and the
bells of those that share one (common/wire/call_ring.py)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from chaos.faults.processes import descendants, environment_of, path_seen_by, state_folder
from chaos.target import Node
from common.wire.call_ring import SLOTS
from common.wire.endpoints import ipc_folder

_RING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-s .*memfd:moemesh-ring", re.MULTILINE)
_EVENTFD = re.compile(r"^eventfd-id:\s*(\d+)", re.MULTILINE)
_STOPS_WITHIN_S = 0.1


class SlotState(IntEnum):
    """States of a slot; mirrors `SlotState` in native/call_ring.h."""

    FREE = 0
    ASKED = 1
    TAKEN = 2
    ANSWERED = 3
    UNWANTED = 4


@dataclass(frozen=True, slots=True)
class Ring:
    """A ring that a process has mapped, from its first address to its end."""

    pid: int
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Returns the size of its file: what is mapped is whole pages. Raises OSError."""
        return os.stat(f"/proc/{self.pid}/map_files/{self.start:x}-{self.stop:x}").st_size

    @property
    def slot_bytes(self) -> int:
        """Returns the size of a slot. Raises OSError."""
        return self.num_bytes // SLOTS

    def states(self) -> list[int]:
        """Returns the state of each slot. Raises OSError where the process is gone, has given the ring up, or is not
        ours to look into."""
        step = self.slot_bytes
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            places = [self.start + index * step for index in range(SLOTS)]
            return [int.from_bytes(os.pread(memory.fileno(), 4, place), "little") for place in places]


def rings_of(node: Node) -> list[Ring]:
    """Returns the rings that a node has mapped; none where it is gone."""
    found = []
    for pid in (node.pid, *descendants(node.pid)):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text()
            found += [Ring(pid, int(start, 16), int(stop, 16)) for start, stop in _RING.findall(maps)]
    return found


def processes_of(nodes: Sequence[Node]) -> list[int]:
    """Returns the processes of these nodes that have rings."""
    return sorted({ring.pid for node in nodes for ring in rings_of(node)})


def bells_of(pid: int, nodes: Sequence[Node]) -> list[int]:
    """Returns the descriptors, in a process with rings, of the bells that it shares with any other process of these
    nodes: it may read them, or ring them. Other eventfds are nobody else's."""
    others = {identity for other in processes_of(nodes) if other != pid for identity in _eventfds(other)}
    return sorted(descriptor for identity, descriptor in _eventfds(pid).items() if identity in others)


def _eventfds(pid: int) -> dict[int, int]:
    """Returns the descriptor of each eventfd of a process by what the kernel calls it; none where it is gone."""
    found = {}
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                if (match := _EVENTFD.search(path.read_text())) is not None:
                    found[int(match[1])] = int(path.name)
    return found


def rings_folder(node: Node) -> Path:
    """Returns where a node listens for rings, as this process reaches it. Raises TargetError."""
    named = environment_of(node).get("RINGS_FOLDER")
    return path_seen_by(node, named) if named else ipc_folder(state_folder(node))


@contextlib.contextmanager
def stopped_process(pid: int) -> Iterator[None]:
    """Stops a process while the block runs. Raises ProcessLookupError where it is gone."""
    os.kill(pid, signal.SIGSTOP)
    try:
        _await_stop(pid)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _await_stop(pid: int) -> None:
    until_s = time.monotonic() + _STOPS_WITHIN_S
    with contextlib.suppress(OSError):
        while time.monotonic() < until_s and not all(map(_is_stopped, Path(f"/proc/{pid}/task").iterdir())):
            time.sleep(0.0005)


def _is_stopped(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True
