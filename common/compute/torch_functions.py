"""exp, silu, sums and softmax in torch whose bits depend on a value's or a row's own numbers alone.

On a CPU torch computes the last elements of a tensor, or of a thread's share of it, with scalar code that rounds
differently from its vector code: the same value at another place gives other bits. (Sums and products of elements round
exactly, anywhere.) A GPU computes each element by the same code.

Sums over rows are the other way round. CUDA's reductions divide a row among more threads where there are fewer rows,
and so add it up in another order. There a row is folded: its second half is added to the first, until one value is
left. On the host torch reduces each row by itself, and is used as it is.
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


def mean_of_squares(x: Tensor) -> Tensor:
    """float32 [..., D] -> [..., 1]."""
    squares = x * x
    return squares.mean(-1, keepdim=True) if x.device.type == "cpu" else folded_sum(squares) / x.shape[-1]


def folded_sum(x: Tensor) -> Tensor:
    """[..., D] -> [..., 1] in x's dtype: the same tree of additions for each row. D is filled up with zeros to a power
    of two."""
    width = 1 << (x.shape[-1] - 1).bit_length()
    x = functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x


def folded_softmax(x: Tensor) -> Tensor:
    """float32 [T, E] -> the same: a softmax over each row. A maximum is exact in any order."""
    weights = torch.exp(x - x.amax(-1, keepdim=True))
    return weights / folded_sum(weights)
