"""K and V of a stage with ranks as rank 0 sees them: in memory that all ranks map, or on each rank's own device."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from common.compute.device import HOST, Device
from common.compute.native_library import NativeKernels
from services.stage.model.kv_store import KvShape, KvStore, LocalKv
from services.stage.model.paged_attention import LayerKvCache
from services.stage.ranks.commands import KvMove, Op, code_of
from services.stage.ranks.kv_window import WINDOW_BLOCKS, WINDOW_ROWS, KvWindow, move
from services.stage.ranks.leader import Conductor
from services.stage.ranks.shared_caches import caches_bytes, take_caches
from services.stage.ranks.shared_channel import RankBoard
from services.stage.ranks.shared_memory import SharedMemory


class GroupMemory(Protocol):
    """At most one at a time."""

    def allocate(self, shape: KvShape) -> KvStore:
        """Zeroed K and V for the ranks that work now. Raises OSError, RuntimeError, CapacityError for want of memory,
        RankLostError."""

    def introduce(self) -> None:
        """Let all that read commands know it: some have come meanwhile. Raises RankLostError."""

    def change_over(self, block_ids: Tensor, change: Callable[[], None]) -> None:
        """`change` gives the ranks other heads; what is in these blocks is there afterwards as before.

        Raises RankLostError, and what `allocate` raises.
        """

    def forget(self) -> None:
        """Let K and V go, on all ranks. Raises RankLostError."""


class _OpenMemory:
    """Memory of rank 0's that the others map."""

    def __init__(self, conductor: Conductor, name: str) -> None:
        self._conductor = conductor
        self._name = name
        self._memory: SharedMemory | None = None
        self._command: list[int] = []

    def open(self, num_bytes: int, shape: KvShape) -> SharedMemory:
        memory = self._memory = SharedMemory.create(num_bytes, self._name)
        place = (os.getpid(), memory.descriptor, num_bytes)
        self._command = [Op.MEMORY, *place, shape.num_layers, shape.num_blocks, code_of(shape.dtype)]
        self.introduce()
        return memory

    def introduce(self) -> None:
        if self._command and self._conductor.attached:
            self._conductor.tell(self._command)

    def close(self) -> None:
        if self._memory is None:
            return
        memory, self._memory, self._command = self._memory, None, []
        try:
            if self._conductor.attached:
                self._conductor.tell((Op.FORGET_MEMORY,))  # by then all have mapped it, by this process's descriptor
        finally:
            memory.close()


class SharedKv:
    """For ranks on the host: K and V stay where they are, whoever joins or is lost."""

    def __init__(self, conductor: Conductor, kernels: NativeKernels | None) -> None:
        self._kernels = kernels
        self._open = _OpenMemory(conductor, "moemesh-kv")

    def allocate(self, shape: KvShape) -> KvStore:
        self.forget()
        caches = take_caches(self._open.open(caches_bytes(shape), shape), shape)
        return LocalKv(shape, caches, self._kernels, HOST)

    def introduce(self) -> None:
        self._open.introduce()

    def change_over(self, block_ids: Tensor, change: Callable[[], None]) -> None:
        change()

    def forget(self) -> None:
        self._open.close()


class OwnKv:
    """For ranks on devices: each has its heads. It is the KvStore of the whole as well."""

    shape: KvShape

    def __init__(self, board: RankBoard, conductor: Conductor, device: Device) -> None:
        self._board = board
        self._conductor = conductor
        self._device = device
        self._open = _OpenMemory(conductor, "moemesh-kv-window")
        self._window: KvWindow | None = None
        self._own: LocalKv | None = None
        self._heads = slice(0, 0)
        self._num_allocations = 0

    def allocate(self, shape: KvShape) -> KvStore:
        self.forget()
        self.shape = shape
        self._window = KvWindow(self._open.open(KvWindow.num_bytes(shape), shape), shape)
        self._allocate()
        return self

    def introduce(self) -> None:
        self._open.introduce()

    def change_over(self, block_ids: Tensor, change: Callable[[], None]) -> None:
        """All of it is on the host meanwhile."""
        keys, values = self.blocks(block_ids)
        change()
        self._allocate()
        self.put_blocks(block_ids, keys, values)

    def forget(self) -> None:
        self._window = self._own = None
        self._device.release()
        self._open.close()

    def _allocate(self) -> None:
        """Each rank its own. None has any where one has no room."""
        self._own = None  # makes room
        self._device.release()
        self._num_allocations += 1
        conductor = self._conductor
        self._heads = conductor.cut.kv_heads(self.shape.num_kv_heads)
        refused: list[Exception] = []

        def allocate_own() -> None:
            own_shape = replace(self.shape, num_kv_heads=self._heads.stop - self._heads.start)
            try:
                self._own = LocalKv.allocate(own_shape, None, self._device)
            except (RuntimeError, ValueError, MemoryError) as error:
                refused.append(error)

        conductor.together((Op.ALLOCATE, self._num_allocations), allocate_own)
        for rank, seat in enumerate(conductor.seats[1:], 1):
            if self._board.get("refused", seat) == self._num_allocations:
                refused.append(self._board.refusal(seat, rank))
        if refused:
            self.forget()
            raise refused[0]

    # ---- the store

    @property
    def caches(self) -> list[LayerKvCache]:
        """Rank 0's heads."""
        assert self._own is not None, "it is allocated, and not forgotten"
        return self._own.caches

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._out(KvMove.ROWS_OUT, positions, WINDOW_ROWS)

    def put_rows(self, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        self._in(KvMove.ROWS_IN, positions, keys, values, WINDOW_ROWS)

    def blocks(self, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._out(KvMove.BLOCKS_OUT, block_ids, WINDOW_BLOCKS)
        return keys.flatten(2), values.flatten(2)

    def put_blocks(self, block_ids: Tensor, keys: Tensor, values: Tensor) -> None:
        self._in(KvMove.BLOCKS_IN, block_ids, keys, values, WINDOW_BLOCKS)

    def _out(self, way: KvMove, places: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
        window = self._opened()
        shape = window.shape_of(way, len(places))
        keys, values = (torch.empty(shape, dtype=self.shape.dtype) for _ in range(2))
        for start in range(0, len(places), at_once):
            piece = slice(start, min(start + at_once, len(places)))
            self._move(window, way, places[piece])
            keys[:, piece], values[:, piece] = window.views(way, piece.stop - start)
        return keys, values

    def _in(self, way: KvMove, places: Tensor, keys: Tensor, values: Tensor, at_once: int) -> None:
        window = self._opened()
        for start in range(0, len(places), at_once):
            piece = slice(start, min(start + at_once, len(places)))
            own_keys, own_values = window.views(way, piece.stop - start)
            own_keys.copy_(keys[:, piece].reshape(own_keys.shape))
            own_values.copy_(values[:, piece].reshape(own_values.shape))
            self._move(window, way, places[piece])

    def _move(self, window: KvWindow, way: KvMove, places: Tensor) -> None:
        own, count = self._own, len(places)
        assert own is not None, "it is allocated, and not forgotten"
        window.places[:count] = places
        self._conductor.together((Op.MOVE_KV, way, count), lambda: move(window, own, self._heads, way, count))

    def _opened(self) -> KvWindow:
        assert self._window is not None, "it is allocated, and not forgotten"
        return self._window
