"""A rank's part of a dense feed-forward network, in two halves: what it holds of the middle, and of the output.

T tokens, D model width, F its width, n ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from common.compute.gated_ffn import gated_product
from common.compute.linear import PackedLinear
from common.compute.native_library import NativeKernels


@dataclass(frozen=True, slots=True)
class DensePart:
    """The bits of the whole network (`GatedExpert`), as long as `down` is cut along its output."""

    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    kernels: NativeKernels | None

    def middle(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, F / n]."""
        return gated_product(self.gate(x), self.up(x), kernels=self.kernels)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]: what this rank adds to the output, `down` being cut along its input."""
        return self.down(self.middle(x))
