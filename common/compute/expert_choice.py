"""A gate's choice of experts: softmax over all of them in float32, the best K of each token, and their weights.

On the host the weights have torch's own bits: native/gate.h says where that holds of the native kernel.

T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from common.compute.linear import KERNEL_DTYPES
from common.compute.native_library import NativeKernels
from common.compute.torch_functions import folded_softmax, folded_sum


class ChoiceDescriptor(ctypes.Structure):
    """`struct Choice` of native/gate.h."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("experts", "experts_per_token", "normalize", "round_weights"))


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """How a model chooses."""

    num_experts_per_token: int
    normalize: bool
    """Whether the weights of a token are divided by their sum."""
    round_weights: bool
    """Whether they are rounded to the dtype of the logits."""

    def descriptor(self, num_experts: int) -> ChoiceDescriptor:
        """Returns it as the native kernels have it. Raises ValueError for more experts a token than there are."""
        if not 1 <= self.num_experts_per_token <= num_experts:
            raise ValueError(f"{self.num_experts_per_token} of {num_experts} experts cannot be chosen")
        return ChoiceDescriptor(num_experts, self.num_experts_per_token, self.normalize, self.round_weights)

    def __call__(self, logits: Tensor, *, kernels: NativeKernels | None) -> tuple[Tensor, Tensor]:
        """Returns for logits [T, E] the experts, int64 [T, K] by falling weight, and their weights, float32 [T, K].

        Raises ValueError when the kernels do not know the dtype.
        """
        if kernels is None or logits.device.type != "cpu":
            return self._by_torch(logits)
        if logits.dtype not in KERNEL_DTYPES:
            raise ValueError(f"logits are float32 or bfloat16, not {logits.dtype}")
        logits = logits.contiguous()
        num_tokens, num_experts = logits.shape
        experts = torch.empty(num_tokens, self.num_experts_per_token, dtype=torch.int64)
        weights = torch.empty(num_tokens, self.num_experts_per_token, dtype=torch.float32)
        descriptor = self.descriptor(num_experts)
        kernels.choose_experts(
            ctypes.addressof(descriptor),
            logits.data_ptr(),
            num_tokens,
            experts.data_ptr(),
            weights.data_ptr(),
            int(logits.dtype == torch.bfloat16),
        )
        return experts, weights

    def _by_torch(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        is_on_host = logits.device.type == "cpu"
        scores = logits.to(torch.float32)
        probabilities = torch.softmax(scores, dim=-1) if is_on_host else folded_softmax(scores)
        weights, experts = torch.topk(probabilities, self.num_experts_per_token, dim=-1)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) if is_on_host else folded_sum(weights))
        if self.round_weights:
            weights = weights.to(logits.dtype).to(torch.float32)
        return experts, weights
