"""What a stage remembers of tokens: K and V of each layer, and the activation log. All of it in the router's blocks.

The activation log is the hidden states that the stage sent on. It is paged like the cache, so it has the lifetime of
the KV blocks and no bookkeeping of its own: a stage that replaces a later one is fed from it. K and V are on the device
that computes; the log is on the host, as all that comes in and goes out is.

T positions, L layers of the stage, H KV heads, W head width, D model width. A *position* here is a place in paged
memory: block * KV_BLOCK_TOKENS + offset.

What goes in and out, to a mirror or where the ranks of a stage change, is of all heads and on the host, wherever K and
V are. A layer's tensors are a `LayerKvCache` (`paged_attention.py`); `LocalKv` has them in this process; `GroupKv` in
services/stage/ranks/kv_memory.py has each rank's heads on that rank's device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from common.compute.device import HOST, Device
from common.compute.huge_pages import zeros_in_huge_pages
from common.compute.native_library import NativeKernels
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, KvShape, LayerKvCache, allocate_kv_cache, write_kv


def positions_of_blocks(block_ids: Tensor) -> Tensor:
    """Returns all positions of blocks int64 [B], int64 [B * KV_BLOCK_TOKENS]."""
    return (block_ids[:, None] * KV_BLOCK_TOKENS + torch.arange(KV_BLOCK_TOKENS)).flatten()


class KvStore(Protocol):
    """Positions are trusted: check them where they come in."""

    shape: KvShape

    @property
    def caches(self) -> list[LayerKvCache]:
        """Returns what this process's forward pass reads and writes, one per layer."""

    @property
    def whole(self) -> list[Tensor] | None:
        """Returns K and V of each layer, [blocks, ...] of all heads, where they lie in this process's memory on the
        host; else None."""

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns copies of K and V at positions int64 [T], [L, T, H, W] each."""

    def put_rows(self, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes what `rows` gave elsewhere."""


class LocalKv:
    """All heads are in this process, on its device."""

    def __init__(
        self, shape: KvShape, caches: list[LayerKvCache], kernels: NativeKernels | None, device: Device
    ) -> None:
        """`device`: where the caches are."""
        self.shape = shape
        self.caches = self._whole = caches
        self._kernels = kernels
        self._device = device

    @classmethod
    def allocate(cls, shape: KvShape, kernels: NativeKernels | None = None, device: Device = HOST) -> LocalKv:
        """Returns zeroed K and V. Raises ValueError, RuntimeError for want of memory."""
        with torch.inference_mode(False):  # mirrors write to it outside of that mode
            is_on_host = device.place.type == "cpu"
            new_tensor = zeros_in_huge_pages if is_on_host else partial(torch.zeros, device=device.place)
            caches = allocate_kv_cache(shape, new_tensor)
        return cls(shape, caches, kernels, device)

    def use_heads(self, heads: slice) -> None:
        """Lets this process's forward pass read and write only these heads; other ranks use the rest of the memory."""
        self.caches = [cache.of_heads(heads.start, heads.stop) for cache in self._whole]

    @property
    def whole(self) -> list[Tensor] | None:
        if not self._device.is_host:
            return None
        return [part for cache in self._whole for part in (cache.keys, cache.values)]

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        blocks, offsets = self._device.to_device(positions // KV_BLOCK_TOKENS, positions % KV_BLOCK_TOKENS)
        keys, values = self._device.to_host(
            torch.stack([cache.keys[blocks, :, :, offsets] for cache in self._whole]),
            torch.stack([cache.values[blocks, :, offsets] for cache in self._whole]),
        )
        return keys, values

    def put_rows(self, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        keys, values, slots = self._device.to_device(keys, values, positions)
        for layer, cache in enumerate(self._whole):
            write_kv(keys[layer], values[layer], cache, slots, kernels=self._kernels)


PROBE_BLOCKS = 1
"""Blocks after the router's: self-tests write there."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What some positions hold."""

    keys: Tensor
    """[L, T, H, W]."""
    values: Tensor
    """[L, T, H, W]."""
    hidden: Tensor
    """[T, D]; [0, D] without a log."""


class PagedMemory:
    """Caches and log of one layer range. Positions are trusted: check them where they come in."""

    def __init__(self, kv: KvStore, log: Tensor) -> None:
        """`log`: [blocks * KV_BLOCK_TOKENS, D], or [0, D] for none."""
        self.kv = kv
        self.log = log

    @property
    def caches(self) -> list[LayerKvCache]:
        """Returns what this process's forward pass reads and writes, one per layer."""
        return self.kv.caches

    @property
    def num_blocks(self) -> int:
        """Returns the number of blocks that the router may use."""
        return self.kv.shape.num_blocks - PROBE_BLOCKS

    @property
    def has_log(self) -> bool:
        """Returns whether there is a log: the last stage of a pipeline needs none."""
        return self.log.shape[0] > 0

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of K, V and the log."""
        return self.log.nbytes + self.kv.shape.num_bytes

    def log_hidden(self, positions: Tensor, hidden: Tensor) -> None:
        """Remembers the hidden states [T, D] that are sent on."""
        if self.has_log:
            self.log.index_copy_(0, positions, hidden)

    def logged(self, positions: Tensor) -> Tensor:
        """Returns what was sent on for these positions, [T, D]."""
        return self.log.index_select(0, positions)

    def rows(self, positions: Tensor) -> Rows:
        """Returns a copy of what these positions hold."""
        keys, values = self.kv.rows(positions)
        return Rows(keys, values, self.logged(positions) if self.has_log else self.log)

    def put_rows(self, positions: Tensor, rows: Rows) -> None:
        """Writes what `rows` gave elsewhere."""
        self.kv.put_rows(positions, rows.keys, rows.values)
        if self.has_log and rows.hidden.shape[0]:
            self.log_hidden(positions, rows.hidden)


def allocate_paged_memory(
    num_layers: int,
    num_blocks: int,
    kv_shape: tuple[int, int],
    log_width: int,
    dtype: torch.dtype,
    *,
    with_log: bool,
    allocate_kv: Callable[[KvShape], KvStore] = LocalKv.allocate,
) -> PagedMemory:
    """Returns zeroed memory for `num_blocks` of the router's blocks. `kv_shape`: KV heads, head width. Raises
    ValueError, and what `allocate_kv` raises."""
    kv = allocate_kv(KvShape(num_layers, num_blocks + PROBE_BLOCKS, *kv_shape, dtype))
    num_positions = (num_blocks + PROBE_BLOCKS) * KV_BLOCK_TOKENS if with_log else 0
    return PagedMemory(kv, torch.zeros((num_positions, log_width), dtype=dtype))
