"""K and V in memory that all ranks of a stage map. Each writes and reads its own heads; rank 0 also sees the whole.

So mirrors, the activation log and replays do not know of ranks, and K and V outlive every rank but the first.
"""

from __future__ import annotations

from services.stage.model.kv_store import KvShape
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, LayerKvCache
from services.stage.ranks.shared_memory import SharedMemory, aligned_bytes


def take_caches(memory: SharedMemory, shape: KvShape) -> list[LayerKvCache]:
    """One cache a layer, out of the beginning of the memory."""
    return [
        LayerKvCache(
            keys=memory.take((shape.num_blocks, shape.num_kv_heads, shape.head_dim, KV_BLOCK_TOKENS), shape.dtype),
            values=memory.take((shape.num_blocks, shape.num_kv_heads, KV_BLOCK_TOKENS, shape.head_dim), shape.dtype),
        )
        for _ in range(shape.num_layers)
    ]


def caches_bytes(shape: KvShape) -> int:
    """How much memory `take_caches` takes."""
    of_one = (shape.num_blocks, shape.num_kv_heads, shape.head_dim, KV_BLOCK_TOKENS)
    return 2 * shape.num_layers * aligned_bytes(of_one, shape.dtype)
