"""K and V that each rank has on its own device, and the window of host memory through which they go in and out.

Where ranks compute on the host they map one K and V together (shared_caches.py). A device's memory is its rank's alone:
so that a mirror, or a group of another degree, gets K and V, every rank copies its heads into the window or out of it.

T positions, B blocks, L layers, H KV heads of the model, h of this rank, W head width.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from services.stage.model.kv_store import KvShape, LocalKv
from services.stage.model.paged_attention import KV_BLOCK_TOKENS
from services.stage.ranks.commands import KvMove
from services.stage.ranks.shared_memory import SharedMemory, aligned_bytes

WINDOW_BLOCKS = 8
"""A piece of a back-fill at a time (`slot/mirror_sender.py`); pages that are never written take no memory."""
WINDOW_ROWS = WINDOW_BLOCKS * KV_BLOCK_TOKENS
_OF_ROWS = (KvMove.ROWS_OUT, KvMove.ROWS_IN)


class KvWindow:
    """One process's view of it."""

    def __init__(self, memory: SharedMemory, shape: KvShape) -> None:
        self.shape = shape
        self.places = memory.take((WINDOW_ROWS,), torch.int64)
        """Positions or blocks that what follows belongs to."""
        self._keys, self._values = (memory.take((WINDOW_ROWS * shape.row_values,), shape.dtype) for _ in range(2))

    @staticmethod
    def num_bytes(shape: KvShape) -> int:
        """Of the whole window."""
        values = WINDOW_ROWS * shape.row_values
        return aligned_bytes((WINDOW_ROWS,), torch.int64) + 2 * aligned_bytes((values,), shape.dtype)

    def shape_of(self, way: KvMove, count: int) -> tuple[int, int, int, int]:
        """[L, T, H, W] of so many positions, [L, B, H, W * KV_BLOCK_TOKENS] of so many blocks."""
        shape = self.shape
        width = shape.head_dim if way in _OF_ROWS else shape.head_dim * KV_BLOCK_TOKENS
        return shape.num_layers, count, shape.num_kv_heads, width

    def views(self, way: KvMove, count: int) -> tuple[Tensor, Tensor]:
        """K and V of so many positions or blocks, as `shape_of` says. Raises RuntimeError for more than it holds."""
        shape = self.shape_of(way, count)
        return self._keys[: prod(shape)].view(shape), self._values[: prod(shape)].view(shape)


def move(window: KvWindow, own: LocalKv, heads: slice, way: KvMove, count: int) -> None:
    """A rank's part of a move: `own` has the KV heads `heads`. Ranks that have the same head write the same bytes."""
    places = window.places[:count]
    keys, values = (view[:, :, heads] for view in window.views(way, count))
    if way is KvMove.ROWS_OUT:
        own_keys, own_values = own.rows(places)
    elif way is KvMove.BLOCKS_OUT:
        own_keys, own_values = own.blocks(places)
    elif way is KvMove.ROWS_IN:
        own.put_rows(places, keys, values)
        return
    else:
        own.put_blocks(places, keys.flatten(2), values.flatten(2))
        return
    keys.copy_(own_keys.view(keys.shape))
    values.copy_(own_values.view(values.shape))
