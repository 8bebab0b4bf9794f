"""Rotary position embedding (halves of a head against each other), with the norm of each head before it where a model
has one (Qwen3).

In bf16 each product and the sum are rounded, as transformers' separate tensors are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.compute.native_library import NativeKernels
from common.compute.rms_norm import rms_norm


def apply_rotary(
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    *,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    kernels: NativeKernels | None,
) -> Tensor:
    """x [T, H, d] -> [T, H, d], a new tensor; the first r values of each head turn, the others stay.

    cosine, sine [T, r] of x's dtype, r <= d and even, the same angles in both halves. x may be a slice of a fused
    projection. norm_weight [d]: RMSNorm of each head comes first. Raises ValueError when shapes or dtypes do not fit.
    """
    tokens, heads, width = x.shape
    turned = cosine.shape[1]
    if cosine.shape != sine.shape or cosine.shape[0] != tokens or turned > width or turned % 2:
        raise ValueError(
            f"cosine {tuple(cosine.shape)} and sine {tuple(sine.shape)} do not fit heads of {tuple(x.shape)}"
        )
    if not cosine.dtype == sine.dtype == x.dtype:
        raise ValueError(f"cosine {cosine.dtype} and sine {sine.dtype} for heads of {x.dtype}")
    if norm_weight is not None and (norm_weight.shape != (width,) or norm_weight.dtype != x.dtype):
        raise ValueError(f"norm weight {tuple(norm_weight.shape)} {norm_weight.dtype} for heads of {width} {x.dtype}")
    if kernels is None or x.device.type != "cpu":
        return _by_torch(x, cosine, sine, norm_weight, epsilon)
    x = x if x.stride(2) == 1 and x.stride(1) == width else x.contiguous()
    cosine, sine = cosine.contiguous(), sine.contiguous()
    y = torch.empty(tokens, heads, width, dtype=x.dtype)
    kernels.rope(
        x.data_ptr(),
        x.stride(0),
        cosine.data_ptr(),
        sine.data_ptr(),
        None if norm_weight is None else norm_weight.data_ptr(),
        y.data_ptr(),
        tokens,
        heads,
        width,
        turned,
        epsilon,
        int(x.dtype == torch.bfloat16),
    )
    return y


def _by_torch(x: Tensor, cosine: Tensor, sine: Tensor, norm_weight: Tensor | None, epsilon: float) -> Tensor:
    if norm_weight is not None:
        x = rms_norm(x.reshape(-1, x.shape[2]), norm_weight, epsilon, kernels=None).view(x.shape)
    turned = cosine.shape[1]
    head, rest = x[..., :turned], x[..., turned:]
    low, high = head[..., : turned // 2], head[..., turned // 2 :]
    rotated = head * cosine[:, None] + torch.cat((-high, low), dim=-1) * sine[:, None]
    return torch.cat((rotated, rest), dim=-1)
