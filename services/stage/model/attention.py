"""Grouped-query attention with rotary positions over the paged KV cache.

Rotary position embedding (Su et al., arXiv 2104.09864) is a table of cos and sin rows.

P positions, T tokens, D model width, H query heads, Hkv key/value heads, N head width. H and Hkv are those of one part
of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.checkpoint.rope_config import RopeConfig
from common.compute.device import HOST_MEMORY
from common.compute.linear import PackedLinear
from common.compute.native_library import NativeKernels
from common.compute.rotary import apply_rotary
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import LayerKvCache, paged_attention, write_kv


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Returns float32 [N/2]. Sources: linear interpolation, YaRN (arXiv 2309.00071), Llama 3.1; as in transformers."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (config.theta**exponents)
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(config, plain)
    if config.kind == "yarn":
        return _yarn(config, head_dim, exponents)
    return plain


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    low_wavelength = config.original_max_position_embeddings / config.low_freq_factor
    high_wavelength = config.original_max_position_embeddings / config.high_freq_factor
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > low_wavelength, plain / config.factor, plain)
    smooth = (config.original_max_position_embeddings / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    between = (1 - smooth) * scaled / config.factor + smooth * scaled
    is_between = ~(wavelength < high_wavelength) & ~(wavelength > low_wavelength)
    return torch.where(is_between, between, scaled)


def _yarn(config: RopeConfig, head_dim: int, exponents: Tensor) -> Tensor:
    def dimension_of(rotations: float) -> float:
        return (head_dim * math.log(config.original_max_position_embeddings / (rotations * 2 * math.pi))) / (
            2 * math.log(config.theta)
        )

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp's slope finite
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    positional = config.theta**exponents
    extrapolated, interpolated = 1.0 / positional, 1.0 / (config.factor * positional)
    kept = 1 - ramp  # and 1 - kept is not always ramp: bit by bit as transformers has it
    return interpolated * (1 - kept) + extrapolated * kept


class RotaryTable:
    """cos and signed sin for all positions, in the compute dtype, made once: a step looks its rows up."""

    def __init__(
        self,
        config: RopeConfig,
        head_dim: int,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device = HOST_MEMORY,
    ) -> None:
        """Computes it on the host and keeps it on `device`: its functions of angles may round otherwise."""
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse_frequencies(config, head_dim)
        cos, sin = angles.cos() * config.attention_factor, angles.sin() * config.attention_factor
        self.cos = torch.cat((cos, cos), dim=-1).to(dtype).to(device)
        # The sign of rotate_half is folded in: a head turns into x * cos + swap_halves(x) * signed_sin.
        self.signed_sin = torch.cat((-sin, sin), dim=-1).to(dtype).to(device)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and signed sin [T, N] for positions [T]."""
        return self.cos.index_select(0, positions), self.signed_sin.index_select(0, positions)


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """The heads of one part of a layer. Query, key and value come from one product, in this order."""

    qkv: PackedLinear
    query_key_norm: Tensor | None
    """[H + Hkv, N]: the query norm's weight repeated for the query heads, then the key norm's; None: no such norm."""
    num_heads: int
    num_kv_heads: int
    kv_heads: slice
    """The KV heads of these, within the cache of the rank that has them; two parts may have the same."""
    head_dim: int
    rms_norm_eps: float
    sliding_window: int | None
    kernels: NativeKernels | None

    def __call__(self, x: Tensor, batch: MicroBatch, rotary: tuple[Tensor, Tensor], cache: LayerKvCache) -> Tensor:
        """Turns x [T, D] into [T, H * N]; K and V go into the cache first, so that the tokens attend to themselves."""
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
            batch.attending_rows,
            scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window or 0,
            kernels=self.kernels,
        )
        return attended.reshape(num_tokens, self.num_heads * self.head_dim)


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention: the heads that this rank has, and what makes the output of those of all ranks."""

    parts: tuple[AttentionHeads, ...]
    output: Callable[[Tensor], Tensor]
    """[T, heads of this rank * N] -> [T, D]."""

    def __call__(self, x: Tensor, batch: MicroBatch, rotary: tuple[Tensor, Tensor], cache: LayerKvCache) -> Tensor:
        """Turns x [T, D] into [T, D], the same on every rank. `cache`: of this rank's KV heads."""
        if len(self.parts) == 1:
            return self.output(self.parts[0](x, batch, rotary, cache))
        caches = [cache.of_heads(part.kv_heads.start, part.kv_heads.stop) for part in self.parts]
        heads = [part(x, batch, rotary, own) for part, own in zip(self.parts, caches, strict=True)]
        return self.output(torch.cat(heads, dim=1))


def repeat_norm_weights(query_norm: Tensor, key_norm: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Returns [H + Hkv, N] of [N] and [N], so that queries and keys are normed in one call."""
    return torch.cat((query_norm.expand(num_heads, -1), key_norm.expand(num_kv_heads, -1))).contiguous()
