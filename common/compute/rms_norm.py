"""RMSNorm as transformers computes it, with the residual addition before it in the same pass.

Statistics are float32. In bf16 the sum, the normalised value and its product with the weight are each rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.compute.native_library import NativeKernels
from common.compute.torch_functions import mean_of_squares


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, kernels: NativeKernels | None) -> Tensor:
    """x [T, D], weight [D], one dtype -> [T, D]. Raises ValueError when they do not fit."""
    _check(x, weight)
    if kernels is None or x.device.type != "cpu":
        return _by_torch(x, weight, epsilon)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=x.dtype)
    is_bf16 = int(x.dtype == torch.bfloat16)
    kernels.rms_norm(
        x.data_ptr(), x.stride(0), None, None, weight.data_ptr(), y.data_ptr(), rows, width, epsilon, is_bf16
    )
    return y


def add_rms_norm(
    residual: Tensor, x: Tensor, weight: Tensor, epsilon: float, *, kernels: NativeKernels | None
) -> tuple[Tensor, Tensor]:
    """(residual + x, norm of that sum); residual and x [T, D]. Raises ValueError when they do not fit."""
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} does not fit {tuple(x.shape)} {x.dtype}")
    if kernels is None or x.device.type != "cpu":
        total = residual + x
        return total, _by_torch(total, weight, epsilon)
    residual, x = residual.contiguous(), x.contiguous()
    rows, width = x.shape
    total, y = torch.empty_like(x), torch.empty_like(x)
    kernels.rms_norm(
        residual.data_ptr(),
        width,
        x.data_ptr(),
        total.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        rows,
        width,
        epsilon,
        int(x.dtype == torch.bfloat16),
    )
    return total, y


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"RMSNorm needs [T, D] and a contiguous weight [D] of one dtype, not {tuple(x.shape)} {x.dtype} and "
            f"{tuple(weight.shape)} {weight.dtype}"
        )


def _by_torch(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(mean_of_squares(wide) + epsilon)
    return weight * wide.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm before a half of a layer, or before the lm_head."""

    weight: Tensor
    epsilon: float
    kernels: NativeKernels | None

    def __call__(self, x: Tensor) -> Tensor:
        """Norms x [T, D] row by row."""
        return rms_norm(x, self.weight, self.epsilon, kernels=self.kernels)

    def of_sum(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the residual stream with x added, and the norm of that, in one pass over memory."""
        return add_rms_norm(residual, x, self.weight, self.epsilon, kernels=self.kernels)
