"""Sums over the rows of a matrix on a device, whose bits do not depend on how many rows there are.

CUDA's reductions divide a row among more threads where there are fewer rows, and so add it up in another order. Here a
row is folded: its second half is added to the first, until one value is left. These are additions element by element,
which round alike in any library and at any place. On the host torch reduces each row by itself, and is used as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
