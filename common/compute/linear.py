"""A linear layer whose rows keep the numeric rule: y[T, N] = x[T, K] @ weight[N, K]^T + bias.

The bits of y[t] depend on x[t] and the weights only, not on T, on the other rows or on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from common.compute.huge_pages import empty_in_huge_pages
from common.compute.native_library import NativeKernels

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


class _LinearDescriptor(ctypes.Structure):
    """`struct Linear` of native/linear.h."""

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
        self.kernels = kernels if is_on_host else None
        """What computes; None: torch does."""
        self.descriptor_address: int | None = None
        """Where `struct Linear` of native/linear.h is, while this object is alive; None: torch computes."""
        if self.kernels is None:
            self._by_torch = TorchLinear(weight, bias) if is_on_host else DeviceLinear(weight, bias)
            return
        (self._packed,) = pack_weights((weight,), self.kernels)
        # fp32, so that a bf16 result is rounded once, after the bias was added.
        self._bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        self._descriptor = _LinearDescriptor(
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.in_features,
            self.out_features,
            int(self.dtype == torch.bfloat16),
            self.kernels.threads,
        )
        self.descriptor_address = ctypes.addressof(self._descriptor)
        self._function = self.kernels.linear

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] of the weights' dtype -> [T, N]. Raises ValueError when x does not fit."""
        shape = x.shape
        if len(shape) != 2 or shape[1] != self.in_features or x.dtype != self.dtype:
            raise ValueError(f"linear needs [T, {self.in_features}] {self.dtype}, not {tuple(shape)} {x.dtype}")
        if self.kernels is None:
            return self._by_torch(x)
        stride = self.in_features
        if not x.is_contiguous():
            x = x if x.stride(1) == 1 else x.contiguous()
            stride = x.stride(0)
        rows = shape[0]
        y = torch.empty(rows, self.out_features, dtype=self.dtype)
        self._function(self.descriptor_address, x.data_ptr(), stride, y.data_ptr(), rows)
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


PACKED_ALIGNMENT = 64
"""In values: a packed weight begins at a cache line."""


def pack_weights(weights: Sequence[Tensor], kernels: NativeKernels) -> list[Tensor]:
    """weights, each [N, K], of one dtype -> the kernels' own layout of each: flat tensors, zero padded, in memory that
    lies together. Raises RuntimeError for want of memory."""
    dtype = weights[0].dtype
    is_bf16 = int(dtype == torch.bfloat16)
    sizes = [kernels.packed_values(*weight.shape, is_bf16) for weight in weights]
    starts = [0, *accumulate(-(-size // PACKED_ALIGNMENT) * PACKED_ALIGNMENT for size in sizes)]
    memory = empty_in_huge_pages((starts[-1],), dtype)
    packed = [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    for weight, place in zip(weights, packed, strict=True):
        source = weight.detach().contiguous()
        kernels.pack(source.data_ptr(), place.data_ptr(), *weight.shape, is_bf16)
    return packed


TILE_ROWS = 16
TILE_COLUMNS = 512
PADDING = 64  # N and K are padded to multiples: odd sizes take other paths in oneDNN


class TorchLinear:
    """The linear layer on a CPU without native kernels: float32 throughout, rounded to the weight's dtype at the end.

    A library may sum over k in another order for another number of rows (oneDNN was seen to for 1 row against more, at
    any K). So every product here has one fixed shape: TILE_ROWS rows, the rest padding, and at most TILE_COLUMNS of k
    at a time, whose float32 results are added in order. That the place of a row among the TILE_ROWS does not matter is
    no promise of oneDNN, but was measured: 60,000 comparisons with AVX-512, AVX2 and SSE4.1 code, none unequal.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [N, K], bias [N]. The float32 copy takes twice the memory of bf16 weights."""
        self._dtype = weight.dtype
        self._out_features, self._in_features = weight.shape
        self._prepacked: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._bias = None if bias is None else bias.detach().to(torch.float32)
        self._padded_in = _up(self._in_features, PADDING)
        wide = functional.pad(
            weight.detach().to(torch.float32),
            (0, self._padded_in - self._in_features, 0, _up(self._out_features, PADDING) - self._out_features),
        )
        panels = [panel.contiguous() for panel in torch.split(wide, TILE_COLUMNS, dim=1)]
        if self._prepacked:
            panels = [torch.ops.mkldnn._reorder_linear_weight(panel, TILE_ROWS) for panel in panels]
        self._panels = panels

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], both of the weight's dtype."""
        tokens = x.shape[0]
        # Without oneDNN there is no measurement to stand on: one row a product, always the first and only one.
        rows = TILE_ROWS if self._prepacked else 1
        padding = (0, self._padded_in - self._in_features, 0, -tokens % rows)
        padded = functional.pad(x.to(torch.float32), padding)
        tiles = [self._tile(tile) for tile in torch.split(padded, rows)]
        result = torch.cat(tiles)[:tokens, : self._out_features] if tiles else x.new_empty(0, self._out_features)
        if self._bias is not None:
            result = result + self._bias
        return result.to(self._dtype, copy=True)

    def _tile(self, rows: Tensor) -> Tensor:
        parts = [
            self._product(part.contiguous(), panel)
            for part, panel in zip(torch.split(rows, TILE_COLUMNS, dim=1), self._panels, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _product(self, rows: Tensor, panel: Tensor) -> Tensor:
        if self._prepacked:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, panel, None, "none", [], "")
            return product
        return functional.linear(rows.clone(), panel)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


DEVICE_ROWS = 64
"""Up to about this many rows a GPU takes as long to read weights as to multiply. By arithmetic, not by measurement."""


class DeviceLinear:
    """The linear layer on a device: its library's products, rounded once to the weight's dtype.

    As in TorchLinear every product has one fixed shape, DEVICE_ROWS rows (the rest padding), here with the whole of k,
    so that the library has one algorithm for it. Within a product each row is added up alike: tests marked `gpu` are
    there to see that. Weights stay in their own dtype, and sums of bfloat16 products are float32
    (`cuda.demand_exact_arithmetic`).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [N, K], bias [N], on the device that computes."""
        self._weight = weight.detach().contiguous()
        self._bias = None if bias is None else bias.detach().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], both of the weight's dtype and on its device."""
        tokens = x.shape[0]
        padded = functional.pad(x, (0, 0, 0, -tokens % DEVICE_ROWS)).contiguous()
        result = x.new_empty((padded.shape[0], self._weight.shape[0]))
        for start in range(0, padded.shape[0], DEVICE_ROWS):
            rows = padded[start : start + DEVICE_ROWS]
            result[start : start + DEVICE_ROWS] = functional.linear(rows, self._weight, self._bias)
        return result[:tokens]
