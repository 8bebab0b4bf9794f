"""Collectives by torch.distributed: Gloo between CPUs, NCCL between GPUs. The module is loaded only where it is used.

A Gloo collective cannot be given up; it ends when a connection closes. So whoever finds that a rank hangs kills it.
All that torch raises over it is a RankLostError: who is alive forms anew.

An NCCL collective is a kernel that waits on the GPU for its peers, for ever if need be, while the host has gone on. The
host notices when it wants something of the GPU: `Device.while_waiting` then looks after the ranks, and `close` aborts
what is under way, so that the GPU is of use again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from common.compute.device import HOST_MEMORY
from common.errors import RankLostError

TIMEOUT = timedelta(seconds=20)
"""For a peer that lives and does not come; a dead or a stopped one is killed long before, which ends the wait."""

ENVIRONMENT = {
    # Ranks of one host.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # Its watchdog would end the process of a rank that waits for a lost one.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}


class TorchCollectives:
    """The default group of this process."""

    def __init__(self, store: Store, rank: int, degree: int, place: torch.device = HOST_MEMORY) -> None:
        """All ranks come here together, each with its tensors at its `place`. Raises RankLostError if one does not."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._is_nccl = place.type == "cuda"
        try:
            with _losing_ranks():
                dist.init_process_group(
                    "nccl" if self._is_nccl else "gloo",
                    store=store,
                    rank=rank,
                    world_size=degree,
                    timeout=TIMEOUT,
                    device_id=place if self._is_nccl else None,  # it connects at once, and not in the first step
                )
        except RankLostError:
            # torch numbers the groups of a process, and looks for the others under that number; it has one in vain.
            dist.distributed_c10d._world.group_count = 0
            raise
        self._place = place
        self._rank = rank
        self.degree = degree
        self.seconds = 0.0
        self.count = 0

    def lay_out(self, x: Tensor) -> None:
        return None

    def broadcast(self, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        began_s = time.perf_counter()
        whole = torch.empty(shape, dtype=dtype, device=self._place) if x is None else x.contiguous()
        with _losing_ranks():
            dist.broadcast(whole, src=0)
        self._count(began_s)
        return whole

    def all_gather(self, part: Tensor) -> Tensor:
        began_s = time.perf_counter()
        parts = [torch.empty_like(part) for _ in range(self.degree)]
        with _losing_ranks():
            dist.all_gather(parts, part.contiguous())
        self._count(began_s)
        return torch.cat(parts, dim=1)

    def gather(self, part: Tensor) -> Tensor | None:
        began_s = time.perf_counter()
        parts = [torch.empty_like(part) for _ in range(self.degree)] if self._rank == 0 else None
        with _losing_ranks():
            dist.gather(part.contiguous(), parts, dst=0)
        self._count(began_s)
        return torch.cat(parts, dim=1) if parts is not None else None

    def sum(self, part: Tensor) -> Tensor | None:
        began_s = time.perf_counter()
        total = part.contiguous()
        with _losing_ranks():
            dist.all_reduce(total)
        self._count(began_s)
        return total if self._rank == 0 else None

    def close(self) -> None:
        if self._is_nccl:
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()

    def _count(self, began_s: float) -> None:
        self.seconds += time.perf_counter() - began_s
        self.count += 1


@contextlib.contextmanager
def _losing_ranks() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # ValueError: the group is gone
        raise RankLostError(f"a collective has failed: {str(error).splitlines()[0]}") from None


def announce(store: Store, rank: int) -> None:
    """Say that a rank is about to come to the rendezvous."""
    store.set(f"here/{rank}", "1")


def is_here(store: Store, rank: int) -> bool:
    """Whether it has said so."""
    return bool(store.check([f"here/{rank}"]))


def open_store(port: int | None = None) -> TCPStore:
    """The rendezvous store: rank 0's own (None: it draws a port), or that at a port of this host."""
    return TCPStore("127.0.0.1", port or 0, is_master=port is None, wait_for_workers=False, timeout=TIMEOUT)
