"""K and V of a stage's layers, in and out: a mirror gets them, and a stage whose ranks change moves them.

What goes in and out is of all heads and on the host, wherever K and V are. `LocalKv` has them in this process;
`OwnKv` in services/stage/ranks/group_memory.py has each rank's heads on that rank's device.

T positions, B blocks, L layers of the stage, H KV heads, W head width. A *position* is a place in paged memory: block *
KV_BLOCK_TOKENS + offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.compute.device import HOST, Device
from common.compute.native_library import NativeKernels
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, LayerKvCache, allocate_kv_cache, write_kv


@dataclass(frozen=True, slots=True)
class KvShape:
    """Of all K and V of a stage, whoever holds which of them."""

    num_layers: int
    num_blocks: int
    """All of them, those for self-tests too."""
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def row_values(self) -> int:
        """Values of one position's K."""
        return self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_bytes(self) -> int:
        """Of K and V together."""
        return 2 * self.row_values * self.num_blocks * KV_BLOCK_TOKENS * self.dtype.itemsize


class KvStore(Protocol):
    """Positions and blocks are trusted: check them where they come in."""

    shape: KvShape

    @property
    def caches(self) -> list[LayerKvCache]:
        """What this process's forward pass reads and writes, one a layer."""

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T] -> copies of K and V there, [L, T, H, W] each."""

    def put_rows(self, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write what `rows` gave elsewhere."""

    def blocks(self, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B] -> copies of whole blocks as they lie in memory, [L, B, H * W * KV_BLOCK_TOKENS] each."""

    def put_blocks(self, block_ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write what `blocks` gave elsewhere."""


class LocalKv:
    """All heads are in this process, on its device."""

    def __init__(
        self, shape: KvShape, caches: list[LayerKvCache], kernels: NativeKernels | None, device: Device
    ) -> None:
        """`device`: where the caches are."""
        self.shape = shape
        self.caches = caches
        self._kernels = kernels
        self._device = device

    @classmethod
    def allocate(cls, shape: KvShape, kernels: NativeKernels | None = None, device: Device = HOST) -> LocalKv:
        """Zeroed. Raises ValueError, RuntimeError for want of memory."""
        with torch.inference_mode(False):  # mirrors write to it outside of that mode
            caches = allocate_kv_cache(
                shape.num_layers, shape.num_blocks, shape.num_kv_heads, shape.head_dim, shape.dtype, device.place
            )
        return cls(shape, caches, kernels, device)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        blocks, offsets = self._device.to_device(positions // KV_BLOCK_TOKENS, positions % KV_BLOCK_TOKENS)
        keys, values = self._device.to_host(
            torch.stack([cache.keys[blocks, :, :, offsets] for cache in self.caches]),
            torch.stack([cache.values[blocks, :, offsets] for cache in self.caches]),
        )
        return keys, values

    def put_rows(self, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        keys, values, slots = self._device.to_device(keys, values, positions)
        for layer, cache in enumerate(self.caches):
            write_kv(keys[layer], values[layer], cache, slots, kernels=self._kernels)

    def blocks(self, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        (chosen,) = self._device.to_device(block_ids)
        keys, values = self._device.to_host(
            torch.stack([cache.keys.flatten(1).index_select(0, chosen) for cache in self.caches]),
            torch.stack([cache.values.flatten(1).index_select(0, chosen) for cache in self.caches]),
        )
        return keys, values

    def put_blocks(self, block_ids: Tensor, keys: Tensor, values: Tensor) -> None:
        keys, values, chosen = self._device.to_device(keys, values, block_ids)
        for layer, cache in enumerate(self.caches):
            cache.keys.flatten(1).index_copy_(0, chosen, keys[layer])
            cache.values.flatten(1).index_copy_(0, chosen, values[layer])
