"""Paged attention where no native kernels are, on a CPU or a device: the same fold over KV tiles, in torch.

As in common/compute/linear.py every product has one fixed shape, TOKENS tokens against one tile each, so that a
token's bits do not depend on who shares the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.compute.torch_elementwise import exponential

TOKENS = 16


def attention_by_torch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    row_sequence: Tensor,
    positions: Tensor,
    scale: float,
    sliding_window: int,
    host_positions: Tensor | None = None,
) -> Tensor:
    """Arguments as of paged_attention.paged_attention, the cache as its two tensors; -> [T, H, d]."""
    tokens = query.shape[0]
    known_positions = positions if host_positions is None else host_positions
    output = torch.empty_like(query)
    for start in range(0, tokens, TOKENS):
        chosen = torch.arange(start, start + TOKENS, device=query.device).clamp(max=tokens - 1)
        result = _attend(
            query[chosen].to(torch.float32),
            keys,
            values,
            block_tables[row_sequence[chosen].long()].long(),
            positions[chosen].long(),
            scale,
            sliding_window,
            _tiles(known_positions[start : start + TOKENS], keys.shape[3], sliding_window),
        )
        output[start : start + TOKENS] = result[: tokens - start].to(query.dtype)
    return output


def _tiles(positions: Tensor, tile_tokens: int, window: int) -> range:
    """Those that any of the tokens at these positions sees."""
    first = max(0, int(positions.min()) - window + 1) if window > 0 else 0
    return range(first // tile_tokens, int(positions.max()) // tile_tokens + 1)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    tiles: range,
) -> Tensor:
    """query [TOKENS, H, d] float32, tables [TOKENS, max_blocks], positions [TOKENS] -> [TOKENS, H, d]."""
    kv_heads, tile_tokens = keys.shape[1], keys.shape[3]
    grouped = query.reshape(TOKENS, kv_heads, -1, query.shape[2])  # [TOKENS, Hkv, G, d]
    starts = (positions - window + 1).clamp(min=0) if window > 0 else torch.zeros_like(positions)
    maximum = query.new_full((*grouped.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(maximum)
    result = torch.zeros_like(grouped)
    offsets = torch.arange(tile_tokens, device=query.device)
    for tile in tiles:
        at = tile * tile_tokens + offsets
        seen = (at >= starts[:, None]) & (at <= positions[:, None])  # [TOKENS, tile]
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
