"""Root mean square layer norm (Zhang & Sennrich, arXiv 1910.07467), rounded where transformers rounds."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., D] scaled to unit mean square in float32, back in x's dtype, times weight (broadcast)."""
    x_float = x.to(torch.float32)
    mean_square = (x_float * x_float).mean(-1, keepdim=True)
    return (x_float * torch.rsqrt(mean_square + epsilon)).to(x.dtype) * weight
