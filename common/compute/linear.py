"""A linear layer whose rows keep the numeric rule: y[T, N] = x[T, K] @ weight[N, K]^T + bias.

The bits of y[t] depend on x[t] and the weights only, not on T, on the other rows or on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from common.compute.device_linear import DeviceLinear
from common.compute.native_library import NativeKernels
from common.compute.torch_linear import TorchLinear

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


class _LinearDescriptor(ctypes.Structure):
    """`struct Linear` of native/kernels.cpp."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class PackedLinear:
    """Weights packed once for `kernels` (None: torch computes); the unpacked tensor may be freed afterwards."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, kernels: NativeKernels | None) -> None:
        """weight [N, K] and bias [N], both float32 or both bfloat16. Raises ValueError for anything else."""
        check_weight(weight, bias)
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.device = weight.device
        is_on_host = weight.device.type == "cpu"
        self._kernels = kernels if is_on_host else None
        if self._kernels is None:
            self._by_torch = TorchLinear(weight, bias) if is_on_host else DeviceLinear(weight, bias)
            return
        self._packed = pack_weight(weight, self._kernels)
        # fp32, so that a bf16 result is rounded once, after the bias was added.
        self._bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        self._descriptor = _LinearDescriptor(
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.in_features,
            self.out_features,
            int(self.dtype == torch.bfloat16),
            self._kernels.threads,
        )
        self._descriptor_address = ctypes.addressof(self._descriptor)
        self._function = self._kernels.linear

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] of the weights' dtype -> [T, N]. Raises ValueError when x does not fit."""
        shape = x.shape
        if len(shape) != 2 or shape[1] != self.in_features or x.dtype != self.dtype:
            raise ValueError(f"linear needs [T, {self.in_features}] {self.dtype}, not {tuple(shape)} {x.dtype}")
        if self._kernels is None:
            return self._by_torch(x)
        stride = self.in_features
        if not x.is_contiguous():
            x = x if x.stride(1) == 1 else x.contiguous()
            stride = x.stride(0)
        rows = shape[0]
        y = torch.empty(rows, self.out_features, dtype=self.dtype)
        self._function(self._descriptor_address, x.data_ptr(), stride, y.data_ptr(), rows)
        return y


def check_weight(weight: Tensor, bias: Tensor | None = None) -> None:
    """Raises ValueError unless weight is [N, K], bias [N] or None, of one dtype that the kernels know."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"a linear weight is [N, K] with N, K >= 1, not {tuple(weight.shape)}")
    if weight.dtype not in KERNEL_DTYPES:
        raise ValueError(f"linear weights are float32 or bfloat16, not {weight.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias {tuple(bias.shape)} {bias.dtype} does not fit weight {tuple(weight.shape)} {weight.dtype}"
        )


def pack_weight(weight: Tensor, kernels: NativeKernels) -> Tensor:
    """weight [N, K] -> the kernels' own layout, a flat tensor of the same dtype, zero padded."""
    rows, columns = weight.shape
    is_bf16 = int(weight.dtype == torch.bfloat16)
    source = weight.detach().contiguous()
    packed = torch.empty(kernels.packed_values(rows, columns, is_bf16), dtype=weight.dtype)
    kernels.pack(source.data_ptr(), packed.data_ptr(), rows, columns, is_bf16)
    return packed
