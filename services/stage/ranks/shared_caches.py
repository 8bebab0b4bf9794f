"""K and V in memory that all ranks of a stage map. Each writes and reads its own heads; rank 0 also sees the whole.

So mirrors, the activation log and replays do not know of ranks, and K and V outlive every rank but the first.
"""

from __future__ import annotations

import torch

from services.stage.attention_kernel import KV_BLOCK_TOKENS, LayerKvCache
from services.stage.ranks.shared_memory import SharedMemory, aligned_bytes


def take_caches(
    memory: SharedMemory, num_layers: int, num_blocks: int, kv_shape: tuple[int, int], dtype: torch.dtype
) -> list[LayerKvCache]:
    """One cache a layer, out of the beginning of the memory. `num_blocks`: all of them. `kv_shape`: KV heads, width."""
    heads, width = kv_shape
    return [
        LayerKvCache(
            keys=memory.take((num_blocks, heads, width, KV_BLOCK_TOKENS), dtype),
            values=memory.take((num_blocks, heads, KV_BLOCK_TOKENS, width), dtype),
        )
        for _ in range(num_layers)
    ]


def caches_bytes(num_layers: int, num_blocks: int, kv_shape: tuple[int, int], dtype: torch.dtype) -> int:
    """How much memory `take_caches` takes."""
    heads, width = kv_shape
    return 2 * num_layers * aligned_bytes((num_blocks, heads, width, KV_BLOCK_TOKENS), dtype)
