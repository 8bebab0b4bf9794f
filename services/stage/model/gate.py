"""The gate of a MoE layer: which experts a token goes to, and with which weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.compute.linear import PackedLinear
from common.compute.row_reduction import folded_softmax, folded_sum


class Gate:
    """Softmax over all experts in float32, the best K of each token, optionally divided by their sum."""

    def __init__(self, linear: PackedLinear, num_experts_per_token: int, normalize: bool, round_weights: bool) -> None:
        self.linear = linear
        self.num_experts_per_token = num_experts_per_token
        self.normalize = normalize
        self.round_weights = round_weights
        is_on_host = linear.device.type == "cpu"
        self._softmax: Callable[[Tensor], Tensor] = _softmax if is_on_host else folded_softmax
        self._row_sum: Callable[[Tensor], Tensor] = _row_sum if is_on_host else folded_sum

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, D] -> experts int64 [T, K] by falling weight, weights float32 [T, K]."""
        logits = self.linear(hidden)
        probabilities = self._softmax(logits.to(torch.float32))
        weights, experts = torch.topk(probabilities, self.num_experts_per_token, dim=-1)
        if self.normalize:
            weights = weights / self._row_sum(weights)
        if self.round_weights:
            weights = weights.to(logits.dtype).to(torch.float32)
        return experts, weights


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1)


def _row_sum(weights: Tensor) -> Tensor:
    return weights.sum(dim=-1, keepdim=True)
