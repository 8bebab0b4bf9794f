"""Grouped-query attention with rotary positions over the paged KV cache.

T tokens, D model width, H query heads, Hkv key/value heads, N head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.compute.linear import PackedLinear
from common.compute.native_library import NativeKernels
from common.compute.rotary import apply_rotary
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import LayerKvCache, paged_attention, write_kv


@dataclass(frozen=True, slots=True)
class Attention:
    """Weights of one layer's attention. Query, key and value come from one product, in this order."""

    qkv: PackedLinear
    output: PackedLinear
    query_key_norm: Tensor | None
    """[H + Hkv, N]: the query norm's weight repeated for the query heads, then the key norm's; None: no such norm."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    sliding_window: int | None
    kernels: NativeKernels | None

    def __call__(self, x: Tensor, batch: MicroBatch, rotary: tuple[Tensor, Tensor], cache: LayerKvCache) -> Tensor:
        """x [T, D] -> [T, D]."""
        return self.output(self.heads(x, batch, rotary, cache))

    def heads(self, x: Tensor, batch: MicroBatch, rotary: tuple[Tensor, Tensor], cache: LayerKvCache) -> Tensor:
        """x [T, D] -> [T, H * N]; K and V go into the cache first, so that the tokens attend to themselves."""
        num_tokens = x.shape[0]
        rotated_heads = self.num_heads + self.num_kv_heads
        heads = self.qkv(x).view(num_tokens, rotated_heads + self.num_kv_heads, self.head_dim)
        query_key = apply_rotary(
            heads[:, :rotated_heads],
            *rotary,
            norm_weight=self.query_key_norm,
            epsilon=self.rms_norm_eps,
            kernels=self.kernels,
        )
        query, key = query_key[:, : self.num_heads], query_key[:, self.num_heads :]
        write_kv(key, heads[:, rotated_heads:], cache, batch.slots, kernels=self.kernels)
        attended = paged_attention(
            query,
            cache,
            batch.block_tables,
            batch.row_sequence,
            batch.positions,
            scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window or 0,
            kernels=self.kernels,
            host_positions=batch.host_positions,
        )
        return attended.reshape(num_tokens, self.num_heads * self.head_dim)


def repeat_norm_weights(query_norm: Tensor, key_norm: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """[N] and [N] -> [H + Hkv, N], so that queries and keys are normed in one call."""
    return torch.cat((query_norm.expand(num_heads, -1), key_norm.expand(num_kv_heads, -1))).contiguous()
