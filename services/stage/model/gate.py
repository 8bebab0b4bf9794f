"""The gate of a MoE layer: which experts a token goes to, and with which weights."""

from __future__ import annotations

import torch
from torch import Tensor

from common.compute.linear import PackedLinear


class Gate:
    """Softmax over all experts in float32, the best K of each token, optionally divided by their sum."""

    def __init__(self, linear: PackedLinear, num_experts_per_token: int, normalize: bool, round_weights: bool) -> None:
        self.linear = linear
        self.num_experts_per_token = num_experts_per_token
        self.normalize = normalize
        self.round_weights = round_weights

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, D] -> experts int64 [T, K] by falling weight, weights float32 [T, K]."""
        logits = self.linear(hidden)
        probabilities = torch.softmax(logits.to(torch.float32), dim=-1)
        weights, experts = torch.topk(probabilities, self.num_experts_per_token, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.round_weights:
            weights = weights.to(logits.dtype).to(torch.float32)
        return experts, weights
