"""exp and silu in torch whose bits depend on the value alone.

Torch computes the last elements of a tensor, or of a thread's share of it, with scalar code that rounds differently
from its vector code: the same value at another place gives other bits. (Sums and products round exactly, anywhere.)
That is so on a CPU; a GPU computes each element by the same code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PART = 4096  # a multiple of any vector loop's step, and small enough that torch does not divide it among threads


def exponential(x: Tensor) -> Tensor:
    """exp(x) for float32 x of any shape, on a CPU in pieces of one fixed size."""
    if x.device.type != "cpu":
        return torch.exp(x)
    flat = functional.pad(x.reshape(-1), (0, -x.numel() % PART))
    parts = [torch.exp(part) for part in flat.split(PART)]  # type: ignore[no-untyped-call]
    return torch.cat(parts)[: x.numel()].view(x.shape) if parts else x.clone()


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) in float32, rounded once to x's dtype, as torch's own."""
    wide = x.to(torch.float32)
    return (wide / (1.0 + exponential(-wide))).to(x.dtype)
