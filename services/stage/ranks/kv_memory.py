"""K and V of a stage with ranks: in memory that all ranks map, or on each rank's own device.

Ranks on the host map one K and V together. Each writes and reads its own heads; rank 0 also sees the whole. So mirrors,
the activation log and replays do not know of ranks, and K and V outlive every rank but the first.

A device's memory is its rank's alone. So that a mirror, or a group of another degree, gets K and V, every rank copies
its heads into a window of host memory, or out of it.

T positions, L layers, H KV heads of the model, W head width.
"""

from __future__ import annotations

import os
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from common.checkpoint.model_config import ModelConfig
from common.compute.device import Device
from common.compute.native_library import NativeKernels
from services.stage.model.kv_cache import KvStore, LocalKv
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, KvShape, LayerKvCache, allocate_kv_cache
from services.stage.model.tp_shard import TpShard
from services.stage.ranks.commands import AllocateKv, ForgetMemory, MoveKv, OpenMemory
from services.stage.ranks.leader import RankLeader
from services.stage.ranks.shared_channel import SharedChannel, SharedMemory, aligned_bytes

WINDOW_ROWS = 8 * KV_BLOCK_TOKENS
"""A piece of a back-fill at a time (services/stage/slot/mirror_sender.py); unwritten pages take no memory."""


def caches_bytes(shape: KvShape) -> int:
    """Returns how much shared memory the caches of all layers take."""
    of_one = (shape.num_blocks, shape.num_kv_heads, shape.head_dim, KV_BLOCK_TOKENS)
    return 2 * shape.num_layers * aligned_bytes(of_one, shape.dtype)


class KvWindow:
    """One process's view of the window."""

    def __init__(self, memory: SharedMemory, shape: KvShape) -> None:
        self.shape = shape
        self.positions = memory.next_tensor((WINDOW_ROWS,), torch.int64)
        """The positions that what follows belongs to."""
        self._keys, self._values = (
            memory.next_tensor((WINDOW_ROWS * shape.row_values,), shape.dtype) for _ in range(2)
        )

    @staticmethod
    def num_bytes(shape: KvShape) -> int:
        """Returns the bytes of the whole window."""
        values = WINDOW_ROWS * shape.row_values
        return aligned_bytes((WINDOW_ROWS,), torch.int64) + 2 * aligned_bytes((values,), shape.dtype)

    def views(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns K and V of this many positions, [L, T, H, W] each. Raises RuntimeError for more than it holds."""
        shape = self.shape.of_rows(count)
        return self._keys[: prod(shape)].view(shape), self._values[: prod(shape)].view(shape)


class RankKv:
    """K and V as one rank has them: its heads of memory that all map, or all of its own device's."""

    def __init__(self, config: ModelConfig, kernels: NativeKernels | None, device: Device) -> None:
        self._config = config
        self._kernels = kernels
        self._device = device
        self._heads = slice(0, config.num_kv_heads)
        self.window: KvWindow | None = None
        self.store: LocalKv | None = None
        """All heads, where ranks share K and V; else those of this rank."""

    @property
    def caches(self) -> list[LayerKvCache]:
        """Returns this rank's heads, by layer."""
        return [] if self.store is None else self.store.caches

    def use(self, shard: TpShard) -> None:
        """Gives this rank these heads from now on. K and V of its own are of other heads then, and are given up."""
        self._heads = shard.kv_heads(self._config.num_kv_heads)
        if not self._device.is_host:
            self.store = None
        elif self.store is not None:
            self.store.use_heads(self._heads)

    def open(self, command: OpenMemory) -> None:
        """Maps what rank 0 has made, and has open meanwhile. Raises OSError if that one is gone."""
        config = self._config
        shape = KvShape(command.num_layers, command.num_blocks, config.num_kv_heads, config.head_dim, command.dtype)
        memory = SharedMemory.open(command.process, command.descriptor, command.num_bytes)
        self.map(memory, shape)
        memory.close()

    def map(self, memory: SharedMemory, shape: KvShape) -> LocalKv | None:
        """Uses this memory; it is K and V of all ranks, which are returned, or the window."""
        if not self._device.is_host:
            self.window = KvWindow(memory, shape)
            return None
        self.store = LocalKv(shape, allocate_kv_cache(shape, memory.next_tensor), self._kernels, self._device)
        self.store.use_heads(self._heads)
        return self.store

    def allocate(self) -> None:
        """Allocates K and V of its own, as large as the window says. Raises ValueError, RuntimeError for want of
        memory."""
        assert self.window is not None, "it is mapped before"
        self.store = None  # makes room
        self._device.release()
        shape = replace(self.window.shape, num_kv_heads=self._heads.stop - self._heads.start)
        self.store = LocalKv.allocate(shape, self._kernels, self._device)

    def move(self, command: MoveKv) -> None:
        """Does this rank's heads of a move through the window. Ranks that have the same head write the same bytes."""
        window, own = self.window, self.store
        assert window is not None, "it is mapped before"
        assert own is not None, "it is allocated, and not forgotten"
        positions = window.positions[: command.count]
        keys, values = (view[:, :, self._heads] for view in window.views(command.count))
        if command.goes_out:
            own_keys, own_values = own.rows(positions)
            keys.copy_(own_keys)
            values.copy_(own_values)
        else:
            own.put_rows(positions, keys, values)

    def forget(self) -> None:
        """Gives all of it up."""
        self.window = self.store = None
        self._device.release()


class GroupKv:
    """K and V as rank 0 sees them, which tells the others. At most one at a time.

    On the host the KvStore is the LocalKv of all heads; on devices it is this object.
    """

    shape: KvShape

    def __init__(self, channel: SharedChannel, leader: RankLeader, own: RankKv, device: Device) -> None:
        """`own`: rank 0's."""
        self._channel = channel
        self._leader = leader
        self._own = own
        self._device = device
        self._memory: SharedMemory | None = None
        self._opened: OpenMemory | None = None
        self._num_allocations = 0

    def allocate(self, shape: KvShape) -> KvStore:
        """Returns zeroed K and V for the ranks that work now. Raises OSError, RuntimeError, CapacityError for want of
        memory, RankLostError."""
        self.forget()
        num_bytes = caches_bytes(shape) if self._device.is_host else KvWindow.num_bytes(shape)
        memory = self._memory = SharedMemory.create(num_bytes, "moemesh-kv")
        place = os.getpid(), memory.descriptor, num_bytes
        self._opened = OpenMemory(*place, shape.num_layers, shape.num_blocks, shape.dtype)
        store = self._own.map(memory, shape)
        self.introduce()
        if store is not None:
            return store
        self.shape = shape
        self.allocate_on_devices()
        return self

    def introduce(self) -> None:
        """Lets all that read messages know the memory: some have come meanwhile. Raises RankLostError."""
        if self._opened is not None and self._leader.attached:
            self._leader.tell(self._opened)

    def forget(self) -> None:
        """Lets K and V go, on all ranks. Raises RankLostError."""
        self._own.forget()
        if self._memory is None:
            return
        memory, self._memory, self._opened = self._memory, None, None
        try:
            if self._leader.attached:
                self._leader.tell(ForgetMemory())  # by then all have mapped it, by this process's descriptor
        finally:
            memory.close()

    def allocate_on_devices(self) -> None:
        """Lets each rank allocate its own, for the heads that it has now. None has any where one has no room. Raises
        as `allocate`."""
        self._num_allocations += 1
        refused: list[Exception] = []

        def allocate_own() -> None:
            try:
                self._own.allocate()
            except (RuntimeError, ValueError, MemoryError) as error:
                refused.append(error)

        self._leader.together(AllocateKv(self._num_allocations), allocate_own)
        for rank, seat in enumerate(self._leader.seats[1:], 1):
            if self._channel.get("refused", seat) == self._num_allocations:
                refused.append(self._channel.refusal(seat, rank))
        if refused:
            self.forget()
            raise refused[0]

    # ---- the store

    @property
    def caches(self) -> list[LayerKvCache]:
        """Returns rank 0's heads."""
        return self._own.caches

    @property
    def whole(self) -> None:
        """They are on devices."""

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (torch.empty(self.shape.of_rows(len(positions)), dtype=self.shape.dtype) for _ in range(2))
        for start in range(0, len(positions), WINDOW_ROWS):
            piece = slice(start, min(start + WINDOW_ROWS, len(positions)))
            self._move(positions[piece], goes_out=True)
            keys[:, piece], values[:, piece] = self._window().views(piece.stop - start)
        return keys, values

    def put_rows(self, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        for start in range(0, len(positions), WINDOW_ROWS):
            piece = slice(start, min(start + WINDOW_ROWS, len(positions)))
            own_keys, own_values = self._window().views(piece.stop - start)
            own_keys.copy_(keys[:, piece])
            own_values.copy_(values[:, piece])
            self._move(positions[piece], goes_out=False)

    def _move(self, positions: Tensor, *, goes_out: bool) -> None:
        command = MoveKv(goes_out, len(positions))
        self._window().positions[: command.count] = positions
        self._leader.together(command, lambda: self._own.move(command))

    def _window(self) -> KvWindow:
        assert self._own.window is not None, "it is allocated, and not forgotten"
        return self._own.window
