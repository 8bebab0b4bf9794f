"""The gated FFN of an expert, for rows of many experts at once: down(silu(gate(x)) * up(x)).

D model width, F expert width, R rows. Rows keep the numeric rule: see linear.py. In bf16 the intermediates are rounded
where transformers materialises a tensor: gate, up, silu(gate), the product, and the result.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from common.compute.linear import PackedLinear, check_weight, pack_weights
from common.compute.native_library import NativeKernels
from common.compute.torch_functions import silu


class GatedExpert:
    """One expert's weights (or a slice of them along F), packed once."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, *, kernels: NativeKernels | None) -> None:
        """gate and up [F, D], down [D, F], one dtype. Raises ValueError when they do not fit together."""
        for weight in (gate, up, down):
            check_weight(weight)
        if gate.shape != up.shape or down.shape != gate.shape[::-1] or not gate.dtype == up.dtype == down.dtype:
            raise ValueError(
                "a gated expert is gate [F, D], up [F, D], down [D, F] of one dtype, not "
                + ", ".join(f"{tuple(weight.shape)} {weight.dtype}" for weight in (gate, up, down))
            )
        self.expert_width, self.model_width = gate.shape
        self.dtype = gate.dtype
        self.kernels = kernels if gate.device.type == "cpu" else None
        if self.kernels is None:
            self._layers = [PackedLinear(weight, kernels=None) for weight in (gate, up, down)]
        else:
            self._packed = pack_weights((gate, up, down), self.kernels)
            # gate, up, down, F: the first fields of `struct Group` in native/gated_ffn.h
            self.group_fields = (*(weight.data_ptr() for weight in self._packed), self.expert_width)

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, D] -> [R, D]. Raises ValueError when x does not fit."""
        return grouped_gated_ffn(x, (0, x.shape[0]), (self,))

    def by_torch(self, x: Tensor) -> Tensor:
        """x [R, D] -> [R, D] without native kernels."""
        gate, up, down = self._layers
        return down(silu(gate(x)) * up(x))


def grouped_gated_ffn(x: Tensor, offsets: Sequence[int], experts: Sequence[GatedExpert]) -> Tensor:
    """Rows [offsets[i], offsets[i+1]) of x go through experts[i]; x [R, D] -> [R, D].

    `offsets` has one entry more than `experts`, begins with 0, ends with R and never falls; a group may be empty.
    Raises ValueError when x, offsets and experts do not fit together.
    """
    if len(offsets) != len(experts) + 1 or offsets[0] != 0 or offsets[-1] != x.shape[0]:
        raise ValueError(f"offsets {list(offsets)} do not divide {x.shape[0]} rows among {len(experts)} experts")
    if not experts:
        return torch.empty_like(x)
    first = experts[0]
    if x.dim() != 2 or x.shape[1] != first.model_width or x.dtype != first.dtype:
        raise ValueError(f"experts need [R, {first.model_width}] {first.dtype}, not {tuple(x.shape)} {x.dtype}")
    for index, expert in enumerate(experts):
        if (
            expert.model_width != first.model_width
            or expert.dtype != first.dtype
            or offsets[index] > offsets[index + 1]
        ):
            raise ValueError(f"group {index} (rows {offsets[index]} to {offsets[index + 1]}) does not fit the others")
    if first.kernels is None:
        parts = zip(offsets, offsets[1:], experts, strict=False)
        return torch.cat([expert.by_torch(x[start:stop]) for start, stop, expert in parts])
    groups = array("q")
    for index, expert in enumerate(experts):
        groups.extend((*expert.group_fields, offsets[index], offsets[index + 1]))
    x = x.contiguous()
    y = torch.empty_like(x)
    first.kernels.gated_ffn(
        x.data_ptr(),
        y.data_ptr(),
        groups.buffer_info()[0],
        len(experts),
        first.model_width,
        int(first.dtype == torch.bfloat16),
        first.kernels.threads,
    )
    return y


def gated_product(gate: Tensor, up: Tensor, *, kernels: NativeKernels | None) -> Tensor:
    """silu(gate) * up, both [R, F] of one dtype: what lies between the linears, with the bits that it has there."""
    if kernels is None or gate.device.type != "cpu":
        return silu(gate) * up
    gate, up = gate.contiguous(), up.contiguous()
    product = torch.empty_like(gate)
    kernels.gated_product(
        gate.data_ptr(), up.data_ptr(), product.data_ptr(), gate.numel(), int(gate.dtype == torch.bfloat16)
    )
    return product
