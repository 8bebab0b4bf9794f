"""How ranks put their parts together: over the shared channel for those of one host, by torch.distributed for the rest.

T rows, C columns of a part, n ranks. Every rank calls the same method with parts of one shape, in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor

from common.compute.device import HOST, HOST_MEMORY, Device
from services.stage.model.sharded_linear import Collectives
from services.stage.ranks.shared_channel import SharedChannel, slab_view

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

CollectivesKind = Literal["board", "gloo", "nccl"]
MAX_BARRIERS = 1 << 20
"""The most barriers between two messages of rank 0."""


class GroupCollectives(Collectives, Protocol):
    """The collectives of one group of ranks."""

    def close(self) -> None:
        """Ends them. What is under way ends too, wherever the others are."""


class Barrier:
    """What the ranks of a group reach together, again and again. Numbers go on from the message by which the group came
    to be, so that ranks agree which barrier it is, whatever became of the group before."""

    def __init__(
        self,
        channel: SharedChannel,
        seats: tuple[int, ...],
        rank: int,
        turn: int,
        wait: Callable[[str, int, int], None],
    ) -> None:
        """`seats` are in order of ranks, `turn` is that of the message. `wait` waits for a seat's word to reach a
        value; it raises what ends the wait."""
        self.rank = rank
        self.degree = len(seats)
        self._channel = channel
        self._others = tuple(seat for seat in seats if seat != seats[rank])
        self._seat = seats[rank]
        self._wait = wait
        self._number = turn * MAX_BARRIERS

    def meet(self) -> None:
        """Says that what this rank had to write is written; returns when the others are as far."""
        self._number += 1
        self._channel.set("arrived", self._seat, self._number)
        for seat in self._others:
            self._wait("arrived", seat, self._number)


class ChannelCollectives:
    """Parts are written where they are needed: the slab that ranks write into is the tensor that they read.

    Two slabs take turns. A rank that writes one again has met all others at the other one's barrier, and they were
    through with this one by then.
    """

    def __init__(self, channel: SharedChannel, barrier: Barrier) -> None:
        self._slabs = channel.slabs
        self._slab_bytes = channel.slab_bytes
        self._rank = barrier.rank
        self._degree = barrier.degree
        self._barrier = barrier
        self._count = 0

    def all_gather(self, part: Tensor) -> Tensor:
        return self._by_rows(self._gather, part, part.shape[1] * self._degree)

    def sum(self, part: Tensor) -> Tensor:
        return self._by_rows(self._add, part, part.shape[1])

    def close(self) -> None:
        return None

    def _by_rows(self, collective: Callable[[Tensor], Tensor], part: Tensor, num_columns: int) -> Tensor:
        """Does as many rows at a time as a slab holds of all ranks. Bits do not depend on where rows are cut."""
        rows, columns = part.shape
        at_once = max(1, self._slab_bytes // (columns * self._degree * part.dtype.itemsize))
        if rows <= at_once:
            return collective(part)
        whole = part.new_empty((rows, num_columns))
        for start in range(0, rows, at_once):
            piece = slice(start, start + at_once)
            whole[piece] = collective(part[piece])
        return whole

    def _gather(self, part: Tensor) -> Tensor:
        rows, columns = part.shape
        whole = slab_view(self._next_slab(), (rows, columns * self._degree), part.dtype)
        whole[:, self._rank * columns : (self._rank + 1) * columns] = part
        self._barrier.meet()
        return whole

    def _add(self, part: Tensor) -> Tensor:
        parts = slab_view(self._next_slab(), (self._degree, *part.shape), part.dtype)
        parts[self._rank] = part
        self._barrier.meet()
        total = parts[0].to(torch.float32)
        for other in range(1, self._degree):
            total = total + parts[other]
        return total.to(part.dtype)

    def _next_slab(self) -> Tensor:
        self._count += 1
        return self._slabs[self._count % 2]


class TpExchange:
    """The collectives of a process's layers, for as long as it lives: what is behind them changes with the group."""

    def __init__(self, channel: SharedChannel, kind: CollectivesKind, device: Device = HOST) -> None:
        self._channel = channel
        self._kind = kind
        self._device = device
        self._staging = HOST if kind == "nccl" else device
        self._degree = 1
        self._group: GroupCollectives | None = None
        self.seconds = 0.0
        """Seconds that this rank has spent in them since the node's incarnation began, without copies from and to a
        device; where a device does them in its own time, in asking for them."""
        self.count = 0
        """How many there were."""

    def join(self, barrier: Barrier, store: Store | None, is_lost: Callable[[], bool]) -> None:
        """Joins the group of this barrier. All its ranks come here together. Raises RankLostError, DeviceError.

        `store`: the rendezvous, None for the shared channel. `is_lost`: whether one of them is, from any thread.
        """
        self.leave()  # should the new ones not come about
        if store is not None:
            # It takes a second to import, and most meshes do without.
            from services.stage.ranks.torch_collectives import TorchCollectives

            place = self._device.place if self._kind == "nccl" else HOST_MEMORY
            self._group = TorchCollectives(store, barrier.rank, barrier.degree, place, is_lost)
        elif barrier.degree > 1:
            self._group = ChannelCollectives(self._channel, barrier)
        self._degree = barrier.degree

    def leave(self) -> None:
        """Leaves the group. What is under way ends, wherever the others are."""
        group, self._group, self._degree = self._group, None, 1
        if group is not None:
            group.close()

    def all_gather(self, part: Tensor) -> Tensor:
        """Returns [T, n * C] of each rank's [T, C], in order of ranks. It is valid until the next collective."""
        if self._group is None:
            return part
        if not part.shape[0]:
            return part.new_empty((0, part.shape[1] * self._degree))
        return self._timed(self._group.all_gather, part)

    def sum(self, part: Tensor) -> Tensor:
        """Returns the sum [T, C] of each rank's [T, C]."""
        if self._group is None or not part.shape[0]:
            return part
        return self._timed(self._group.sum, part)

    def _timed(self, collective: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
        (part,) = self._staging.to_host(part)
        began_s = time.perf_counter()
        whole = collective(part)
        self.seconds += time.perf_counter() - began_s
        self.count += 1
        return self._staging.to_device(whole)[0]


def choose_collectives(setting: str, *, is_on_host: bool, have_own_gpus: bool) -> CollectivesKind:
    """Returns what `auto` stands for. A named one stays as it is; what cannot be is refused where the device is
    opened."""
    if setting != "auto":
        return cast(CollectivesKind, setting)
    return "nccl" if have_own_gpus and not is_on_host else "board"
