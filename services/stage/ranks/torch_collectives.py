"""Collectives by torch.distributed: Gloo between CPUs, NCCL between GPUs. The module is loaded only where it is used.

A Gloo collective cannot be given up; it ends when a connection closes. So a rank that is found to hang is killed. All
that torch raises over it is a RankLostError: those alive form a new group.

An NCCL collective is a kernel that waits on the GPU for its peers, for ever if need be. The host has gone on meanwhile,
until it wants something of the GPU or has asked for so much that the driver takes no more; then it waits too. So
another thread aborts what is under way once a rank is lost, and the GPU is of use again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from common.compute.device import HOST_MEMORY
from common.compute.device_errors import raise_if_life_ending
from common.errors import DeviceError, RankLostError

TIMEOUT = timedelta(seconds=20)
"""The limit for a peer that lives and does not come; one dead or stopped is killed long before, which ends the wait."""

LOOK_S = 0.05
CONNECTED_S = 2.0
"""How long NCCL has to notice that a rank has gone while they connect; it has no time-out for that."""
ENVIRONMENT = {
    # Ranks of one host.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # Its watchdog would end the process of a rank that waits for a lost one.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}


class TorchCollectives:
    """The default group of this process."""

    def __init__(
        self,
        store: Store,
        rank: int,
        degree: int,
        place: torch.device = HOST_MEMORY,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """Joins all ranks, which come here together, each with its tensors at its `place`. Raises RankLostError if one
        does not.

        `is_lost`: whether a rank of these is, from any thread; NCCL would wait for it.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._is_nccl = place.type == "cuda"
        self._is_closed = threading.Event()

        def connect() -> None:
            dist.init_process_group(
                "nccl" if self._is_nccl else "gloo",
                store=store,
                rank=rank,
                world_size=degree,
                timeout=TIMEOUT,
                device_id=place if self._is_nccl else None,  # it connects at once, and not in the first step
            )

        try:
            with _losing_ranks():
                if self._is_nccl:
                    _run_unless_lost(connect, place, is_lost)
                    threading.Thread(target=self._watch, args=(is_lost,), name="nccl", daemon=True).start()
                else:
                    connect()
        except RankLostError:
            # torch numbers the groups of a process, and looks for the others under that number; it has one in vain.
            dist.distributed_c10d._world.group_count = 0
            raise
        self._degree = degree

    def all_gather(self, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(self._degree)]
        with _losing_ranks():
            dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=1)

    def sum(self, part: Tensor) -> Tensor:
        total = part.contiguous()
        with _losing_ranks():
            dist.all_reduce(total)
        return total

    def close(self) -> None:
        self._is_closed.set()
        if self._is_nccl:
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()

    def _watch(self, is_lost: Callable[[], bool]) -> None:
        """Aborts the group when a rank is lost, in a thread that waits for no rank and no GPU."""
        while not self._is_closed.wait(LOOK_S):
            if is_lost():
                group = dist.group.WORLD
                if group is not None:
                    group.abort()
                return


@contextlib.contextmanager
def _losing_ranks() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # ValueError: the group is gone
        raise_if_life_ending(error)
        raise RankLostError(f"a collective has failed: {str(error).splitlines()[0]}") from None


def _run_unless_lost(connect: Callable[[], None], place: torch.device, is_lost: Callable[[], bool]) -> None:
    """Raises what `connect` raises, and DeviceError where it does not come back from a rank that is lost: of what it
    holds then nothing can be freed but with the process."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            torch.cuda.set_device(place)
            connect()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="nccl-connects", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_S)
        if thread.is_alive() and is_lost():
            thread.join(CONNECTED_S)
            if thread.is_alive():
                raise DeviceError("NCCL waits for a rank that is lost; this process exits")
    if raised:
        raise raised[0]


def announce(store: Store, rank: int) -> None:
    """Says that a rank is about to come to the rendezvous."""
    store.set(f"here/{rank}", "1")


def is_here(store: Store, rank: int) -> bool:
    """Returns whether it has said so."""
    return bool(store.check([f"here/{rank}"]))


def open_store(port: int | None = None) -> TCPStore:
    """Returns the rendezvous store: rank 0's own (None: it draws a port), or that at a port of this host."""
    return TCPStore("127.0.0.1", port or 0, is_master=port is None, wait_for_workers=False, timeout=TIMEOUT)
