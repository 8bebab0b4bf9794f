"""Rotary position embedding (halves of a head against each other), with the norm of each head before it where a model
has one (Qwen3).

In bf16 each product and the sum are rounded, as transformers' separate tensors are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.compute.native_library import NativeKernels
from common.compute.torch_functions import mean_of_squares


def apply_rotary(
    x: Tensor,
    cosine: Tensor,
    signed_sine: Tensor,
    *,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    kernels: NativeKernels | None,
) -> Tensor:
    """x [T, H, d] -> [T, H, d], a new tensor; the first r values of each head turn, the others stay.

    cosine, signed_sine [T, r] of x's dtype, r <= d and even, the same angles in both halves, the sine negative in the
    first half. x may be a slice of a fused projection.
    norm_weight: RMSNorm of each head comes first, [d] for one weight or [H, d] for one a head.
    Raises ValueError when shapes or dtypes do not fit.
    """
    _check(x, cosine, signed_sine, norm_weight)
    if kernels is None or x.device.type != "cpu":
        return _by_torch(x, cosine, signed_sine, norm_weight, epsilon)
    tokens, heads, width = x.shape
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    x = x if x.stride(2) == 1 and x.stride(1) == width else x.contiguous()
    cosine, signed_sine = cosine.contiguous(), signed_sine.contiguous()
    y = torch.empty(tokens, heads, width, dtype=x.dtype)
    kernels.rope(
        x.data_ptr(),
        x.stride(0),
        cosine.data_ptr(),
        signed_sine.data_ptr(),
        None if norm_weight is None else norm_weight.data_ptr(),
        width if norm_weight is not None and norm_weight.dim() == 2 else 0,
        y.data_ptr(),
        tokens,
        heads,
        width,
        cosine.shape[1],
        epsilon,
        int(x.dtype == torch.bfloat16),
    )
    return y


def _check(x: Tensor, cosine: Tensor, signed_sine: Tensor, norm_weight: Tensor | None) -> None:
    tokens, heads, width = x.shape
    turned = cosine.shape[1]
    if cosine.shape != signed_sine.shape or cosine.shape[0] != tokens or turned > width or turned % 2:
        raise ValueError(
            f"cosine {tuple(cosine.shape)} and sine {tuple(signed_sine.shape)} do not fit heads of {tuple(x.shape)}"
        )
    if not cosine.dtype == signed_sine.dtype == x.dtype:
        raise ValueError(f"cosine {cosine.dtype} and sine {signed_sine.dtype} for heads of {x.dtype}")
    if norm_weight is None:
        return
    if norm_weight.shape not in ((width,), (heads, width)) or norm_weight.dtype != x.dtype:
        raise ValueError(f"norm weight {tuple(norm_weight.shape)} {norm_weight.dtype} for {tuple(x.shape)} {x.dtype}")


def _by_torch(x: Tensor, cosine: Tensor, signed_sine: Tensor, norm_weight: Tensor | None, epsilon: float) -> Tensor:
    if norm_weight is not None:
        wide = x.to(torch.float32).contiguous()
        wide = wide * torch.rsqrt(mean_of_squares(wide) + epsilon)
        x = wide.to(x.dtype) * norm_weight
    turned = cosine.shape[1]
    head, rest = x[..., :turned], x[..., turned:]
    swapped = torch.roll(head, turned // 2, dims=-1)
    return torch.cat((head * cosine[:, None] + swapped * signed_sine[:, None], rest), dim=-1)
