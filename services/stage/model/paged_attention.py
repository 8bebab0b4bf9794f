"""Causal attention over a paged KV cache, and the writing of new keys and values into it.

T tokens, H query heads, Hkv key/value heads, d head width. One layer's cache is two tensors:
    keys   [blocks, Hkv, d, KV_BLOCK_TOKENS]   transposed inside a block: scores then need no sums across lanes
    values [blocks, Hkv, KV_BLOCK_TOKENS, d]
A KV block is also the tile of the online softmax: a token's result is a fold over the tiles of its sequence, in
position order, cut at multiples of KV_BLOCK_TOKENS, or over sections of several tiles (native/attention_pairs.h). So
its bits do not depend on the chunk that it came in.

Where there are no native kernels, or K and V are on a device, torch computes the same fold over KV tiles: as in
common/compute/linear.py every product has one fixed shape, TORCH_TOKENS tokens against one tile each, so that a token's
bits do not depend on which others share the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.compute.linear import KERNEL_DTYPES
from common.compute.native_library import NativeKernels
from common.compute.torch_functions import exponential

KV_BLOCK_TOKENS = 32  # KV_BLOCK in common/compute/native/vectors.h
TORCH_TOKENS = 16


@dataclass(frozen=True, slots=True)
class LayerKvCache:
    """Keys and values of one layer, laid out as the head of this file says."""

    keys: Tensor
    values: Tensor

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[0]

    @property
    def heads_between_blocks(self) -> int:
        """Returns the KV heads from one block to the next: more than `keys` has where it is a view of some heads."""
        return self.keys.stride(0) // (self.keys.shape[2] * KV_BLOCK_TOKENS)

    def of_heads(self, start: int, stop: int) -> LayerKvCache:
        """Returns a view of KV heads [start, stop)."""
        return LayerKvCache(self.keys[:, start:stop], self.values[:, start:stop])


class _AttentionDescriptor(ctypes.Structure):
    """`struct Attention` of common/compute/native/attention_parts.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "keys", "values", "tables", "sequences", "positions", "output")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("tokens", "heads", "kv_heads", "cache_heads", "width", "max_blocks", "window", "threads")
        ),
        ("scale", ctypes.c_double),
    )


@dataclass(frozen=True, slots=True)
class KvShape:
    """The shape of all K and V of a stage, whichever rank holds which of them."""

    num_layers: int
    num_blocks: int
    """All of them, those for self-tests too."""
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def row_values(self) -> int:
        """Returns the number of values of one position's K."""
        return self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of K and V together."""
        return 2 * self.row_values * self.num_blocks * KV_BLOCK_TOKENS * self.dtype.itemsize

    def of_rows(self, count: int) -> tuple[int, int, int, int]:
        """Returns [L, T, H, W] of this many positions."""
        return self.num_layers, count, self.num_kv_heads, self.head_dim


def allocate_kv_cache(shape: KvShape, new_tensor: Callable[..., Tensor] = torch.zeros) -> list[LayerKvCache]:
    """Returns one cache per layer, zeroed. `new_tensor` makes each tensor, of a shape and `dtype`, in this order.

    Raises ValueError for a dtype that the kernels do not know, and what `new_tensor` raises.
    """
    if shape.dtype not in KERNEL_DTYPES:
        raise ValueError(f"a KV cache is float32 or bfloat16, not {shape.dtype}")
    num_blocks, num_heads, width = shape.num_blocks, shape.num_kv_heads, shape.head_dim
    return [
        LayerKvCache(
            keys=new_tensor((num_blocks, num_heads, width, KV_BLOCK_TOKENS), dtype=shape.dtype),
            values=new_tensor((num_blocks, num_heads, KV_BLOCK_TOKENS, width), dtype=shape.dtype),
        )
        for _ in range(shape.num_layers)
    ]


def write_kv(key: Tensor, value: Tensor, cache: LayerKvCache, slots: Tensor, *, kernels: NativeKernels | None) -> None:
    """Puts key and value [T, Hkv, d] at slots [T] int64 (block * KV_BLOCK_TOKENS + offset; negative: skipped, but on a
    device not allowed).

    Raises ValueError when shapes or dtypes do not fit the cache. Slots are trusted: check them where they come in.
    """
    tokens, kv_heads, width = key.shape
    if cache.keys.shape[1:3] != (kv_heads, width) or value.shape != key.shape or slots.shape != (tokens,):
        raise ValueError(
            f"key {tuple(key.shape)}, value {tuple(value.shape)}, slots {tuple(slots.shape)} do not fit a cache of "
            f"{tuple(cache.keys.shape)}"
        )
    if key.dtype != cache.keys.dtype or value.dtype != cache.keys.dtype or slots.dtype != torch.int64:
        raise ValueError(f"key {key.dtype}, value {value.dtype}, slots {slots.dtype} for a cache of {cache.keys.dtype}")
    if kernels is None or key.device.type != "cpu":
        if slots.device.type == "cpu":  # the host would wait for a device to count them; steps have none
            kept = slots >= 0
            key, value, slots = key[kept], value[kept], slots[kept]
        blocks, offsets = slots // KV_BLOCK_TOKENS, slots % KV_BLOCK_TOKENS
        cache.keys[blocks, :, :, offsets] = key
        cache.values[blocks, :, offsets] = value
        return
    key, value = _packed_heads(key), _packed_heads(value)
    slots = slots.contiguous()
    kernels.write_kv(
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        cache.keys.data_ptr(),
        cache.values.data_ptr(),
        slots.data_ptr(),
        tokens,
        kv_heads,
        cache.heads_between_blocks,
        width,
        int(key.dtype == torch.bfloat16),
    )


def _packed_heads(x: Tensor) -> Tensor:
    """Returns x [T, Hkv, d] as it is where a token's heads lie together, as in a slice of a fused projection; else a
    copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@dataclass(frozen=True, slots=True)
class AttendingRows:
    """Where the tokens stand that attend. T tokens of Q sequences, B blocks in the longest table."""

    block_tables: Tensor
    """int32 [Q, B]: block of each KV_BLOCK_TOKENS positions of a sequence."""
    row_sequence: Tensor
    """int32 [T]: the row of `block_tables` of each token. Those of one sequence should follow each other: they are then
    computed together."""
    positions: Tensor
    """int32 [T]."""
    host_positions: Tensor | None = None
    """The same on the host, where the rest is on a device."""


def paged_attention(
    query: Tensor,
    cache: LayerKvCache,
    rows: AttendingRows,
    *,
    scale: float,
    sliding_window: int = 0,
    kernels: NativeKernels | None,
) -> Tensor:
    """Turns query [T, H, d] into [T, H, d]; the token at position p attends to positions max(0, p - window + 1) to p.

    sliding_window 0 is none. Raises ValueError when shapes or dtypes do not fit. Indices are trusted: check them where
    they come in.
    """
    _check(query, cache, rows)
    if kernels is None or query.device.type != "cpu":
        return _attend_by_torch(query, cache, rows, scale, sliding_window)
    query = query.contiguous()
    block_tables, row_sequence = rows.block_tables.contiguous(), rows.row_sequence.contiguous()
    positions = rows.positions.contiguous()
    output = torch.empty_like(query)
    descriptor = _AttentionDescriptor(
        query.data_ptr(),
        cache.keys.data_ptr(),
        cache.values.data_ptr(),
        block_tables.data_ptr(),
        row_sequence.data_ptr(),
        positions.data_ptr(),
        output.data_ptr(),
        *query.shape[:2],
        cache.keys.shape[1],
        cache.heads_between_blocks,
        query.shape[2],
        block_tables.shape[1],
        sliding_window,
        kernels.threads,
        scale,
    )
    kernels.attention(ctypes.addressof(descriptor), int(query.dtype == torch.bfloat16))
    return output


def _check(query: Tensor, cache: LayerKvCache, rows: AttendingRows) -> None:
    tokens, heads, width = query.shape
    block_tables, row_sequence, positions = rows.block_tables, rows.row_sequence, rows.positions
    if heads % cache.keys.shape[1] or width != cache.keys.shape[2] or query.dtype != cache.keys.dtype:
        raise ValueError(
            f"query {tuple(query.shape)} {query.dtype} does not fit a cache of {tuple(cache.keys.shape)} "
            f"{cache.keys.dtype}"
        )
    if block_tables.dim() != 2 or row_sequence.shape != (tokens,) or positions.shape != (tokens,):
        raise ValueError(
            f"block_tables {tuple(block_tables.shape)}, row_sequence {tuple(row_sequence.shape)}, positions "
            f"{tuple(positions.shape)} do not fit {tokens} tokens"
        )
    if not block_tables.dtype == row_sequence.dtype == positions.dtype == torch.int32:
        raise ValueError(
            f"block_tables, row_sequence and positions are int32, not {block_tables.dtype}, "
            f"{row_sequence.dtype} and {positions.dtype}"
        )


def _attend_by_torch(
    query: Tensor, cache: LayerKvCache, rows: AttendingRows, scale: float, sliding_window: int
) -> Tensor:
    """Does what `paged_attention` does, TORCH_TOKENS tokens at a time."""
    tokens = query.shape[0]
    known_positions = rows.positions if rows.host_positions is None else rows.host_positions
    output = torch.empty_like(query)
    for start in range(0, tokens, TORCH_TOKENS):
        chosen = torch.arange(start, start + TORCH_TOKENS, device=query.device).clamp(max=tokens - 1)
        result = _attend(
            query[chosen].to(torch.float32),
            cache,
            rows.block_tables[rows.row_sequence[chosen].long()].long(),
            rows.positions[chosen].long(),
            scale,
            sliding_window,
            _tiles(known_positions[start : start + TORCH_TOKENS], cache.keys.shape[3], sliding_window),
        )
        output[start : start + TORCH_TOKENS] = result[: tokens - start].to(query.dtype)
    return output


def _tiles(positions: Tensor, tile_tokens: int, window: int) -> range:
    """Returns the tiles that any of the tokens at these positions sees."""
    first = max(0, int(positions.min()) - window + 1) if window > 0 else 0
    return range(first // tile_tokens, int(positions.max()) // tile_tokens + 1)


def _attend(
    query: Tensor, cache: LayerKvCache, tables: Tensor, positions: Tensor, scale: float, window: int, tiles: range
) -> Tensor:
    """Turns query [T, H, d] float32, with tables [T, max_blocks] and positions [T], into [T, H, d], T being
    TORCH_TOKENS."""
    keys, values = cache.keys, cache.values
    kv_heads, tile_tokens = keys.shape[1], keys.shape[3]
    grouped = query.reshape(TORCH_TOKENS, kv_heads, -1, query.shape[2])  # [T, Hkv, G, d]
    starts = (positions - window + 1).clamp(min=0) if window > 0 else torch.zeros_like(positions)
    maximum = query.new_full((*grouped.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(maximum)
    result = torch.zeros_like(grouped)
    offsets = torch.arange(tile_tokens, device=query.device)
    for tile in tiles:
        at = tile * tile_tokens + offsets
        seen = (at >= starts[:, None]) & (at <= positions[:, None])  # [T, tile]
        active = seen.any(-1)[:, None, None, None]
        # A token beyond its own last tile may have no block here: any will do, nothing of it is kept.
        blocks = torch.where(seen.any(-1), tables[:, min(tile, tables.shape[1] - 1)], 0)
        scores = torch.matmul(grouped, keys[blocks].to(torch.float32)) * scale
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        largest = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weights = exponential(scores - largest)
        correction = exponential(maximum - largest)
        # What a freed slot still holds, be it infinite, must not come in through 0 * value.
        tile_values = values[blocks].to(torch.float32).masked_fill(~seen[:, None, :, None], 0.0)
        new_result = result * correction + torch.matmul(weights, tile_values)
        new_total = total * correction + weights.sum(-1, keepdim=True)
        result = torch.where(active, new_result, result)
        total = torch.where(active, new_total, total)
        maximum = torch.where(active, largest, maximum)
    return (result / total).flatten(1, 2)
