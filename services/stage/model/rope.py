"""Rotary position embedding (Su et al., arXiv 2104.09864): a table of cos and sin rows.

P positions, N head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.checkpoint.rope_config import RopeConfig
from common.compute.device import HOST_MEMORY


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """float32 [N/2]. Sources: linear interpolation, YaRN (arXiv 2309.00071), Llama 3.1; as in transformers."""
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
        """Computed on the host, kept on `device`: its functions of angles may round otherwise."""
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse_frequencies(config, head_dim)
        cos, sin = angles.cos() * config.attention_factor, angles.sin() * config.attention_factor
        self.cos = torch.cat((cos, cos), dim=-1).to(dtype).to(device)
        # The sign of rotate_half is folded in: a head turns into x * cos + swap_halves(x) * signed_sin.
        self.signed_sin = torch.cat((-sin, sin), dim=-1).to(dtype).to(device)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin [T, N] for positions [T]."""
        return self.cos[positions], self.signed_sin[positions]
