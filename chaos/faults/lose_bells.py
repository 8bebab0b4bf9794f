"""What tells a process that there is something for it in a ring does not arrive."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from chaos.faults.background import BackgroundFault
from chaos.faults.base import Range
from chaos.faults.rings import bells_of, processes_of, rings_of, stopped_process
from chaos.target import Node, Target, TargetError

_PIDFD_GETFD = 438
"""The number of the system call, on every kind of machine."""
RING_S = 0.05
"""How long a stopped victim is waited for: meanwhile the others ring its bell."""


class LoseBells(BackgroundFault):
    """Every `every_s` each victim is stopped for 50 ms, while the others ring, and then the bells that it shares with
    them are read empty, its own and theirs, so that it does not wake up for what has come. Until it is healed."""

    name = "lose_bells"
    every_s: Annotated[float, Range(0.01, 10)] = 0.1

    def unavailable(self, target: Target) -> str:
        if not hasattr(os, "pidfd_open"):
            return "this system cannot hand over a descriptor of another process"
        try:
            with _bell_of(os.getpid(), 0):
                return ""
        except OSError as error:
            return f"a descriptor of another process cannot be had: {error.strerror}"

    def can_hurt(self, node: Node) -> bool:
        return bool(rings_of(node))

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        nodes = target.nodes()
        for victim in victims:
            _take_one_bell(victim, nodes)
        names = {victim.name for victim in victims}
        self._begin(lambda: self._lose_until_healed(target, names), patience_s=0.0)

    def _lose_until_healed(self, target: Target, names: Collection[str]) -> None:
        num_lost = 0
        self.doubt = "no bell was rung while its victims stood still"
        while not self._stopped.wait(self.every_s):
            nodes = target.nodes()  # those that have come since ring as well
            for pid in processes_of([node for node in nodes if node.name in names]):
                num_lost += self._lose(pid, nodes)
            if num_lost:
                self.remark, self.doubt = f"bells lost: {num_lost}", ""

    def _lose(self, pid: int, nodes: Sequence[Node]) -> int:
        """Returns how many bells were lost; none where a process has ended meanwhile."""
        with contextlib.suppress(ProcessLookupError), contextlib.ExitStack() as stopped:
            # Those that would ring stand still until it does, or it might be on its way out of its wait.
            with contextlib.ExitStack() as others:
                for other in processes_of(nodes):
                    if other != pid:
                        others.enter_context(stopped_process(other))
                stopped.enter_context(stopped_process(pid))
            self._stopped.wait(RING_S)
            return silence_bells(pid, nodes)
        return 0


def _take_one_bell(victim: Node, nodes: Sequence[Node]) -> None:
    """Shows that a bell of the victim can be had. Raises TargetError."""
    processes = processes_of([victim])
    if not processes:
        raise TargetError(f"{victim.name}: no ring is mapped there")
    bells = [(pid, descriptor) for pid in processes for descriptor in bells_of(pid, nodes)]
    if not bells:
        raise TargetError(f"{victim.name}: it shares no bell with another node")
    try:
        with _bell_of(*bells[0]):
            pass
    except OSError as error:
        raise TargetError(f"the bells of {victim.name} cannot be had: {error.strerror}") from None


def silence_bells(pid: int, nodes: Sequence[Node]) -> int:
    """Reads all bells of a process empty. Returns how many had been rung."""
    num_rung = 0
    for descriptor in bells_of(pid, nodes):
        with contextlib.suppress(OSError), _bell_of(pid, descriptor) as bell:
            num_rung += os.eventfd_read(bell) > 0  # none: BlockingIOError
    return num_rung


@contextlib.contextmanager
def _bell_of(pid: int, descriptor: int) -> Iterator[int]:
    """The descriptor of another process as one of this one. Raises OSError."""
    process = os.pidfd_open(pid)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        own = library.syscall(_PIDFD_GETFD, process, descriptor, 0)
        if own < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(Path(f"/proc/{pid}/fd/{descriptor}")))
    finally:
        os.close(process)
    try:
        yield own
    finally:
        os.close(own)
