"""The gate against the routers of both families, as transformers computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from common.compute.expert_choice import ExpertChoice
from common.compute.linear import PackedLinear
from services.stage.model.layer_half.composed import Gate
from tests.support.nodes.kernels import KERNEL_CHOICES, kernels_for, one_torch_thread

__all__ = ["one_torch_thread"]


def seeded(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def router_of(family: str, normalize: bool, weight: torch.Tensor) -> Any:
    num_experts, width = weight.shape
    mixtral_router: Any = MixtralTopKRouter
    qwen3_router: Any = Qwen3MoeTopKRouter
    if family == "mixtral":
        router = mixtral_router(MixtralConfig(hidden_size=width, num_local_experts=num_experts, num_experts_per_tok=3))
    else:
        router = qwen3_router(
            Qwen3MoeConfig(hidden_size=width, num_experts=num_experts, num_experts_per_tok=3, norm_topk_prob=normalize)
        )
    router.weight = torch.nn.Parameter(weight)
    return router


@pytest.mark.parametrize("kernels", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "normalize"), [("mixtral", True), ("qwen3_moe", True), ("qwen3_moe", False)])
def test_experts_and_weights_are_transformers_own(
    family: str, normalize: bool, dtype: torch.dtype, kernels: str
) -> None:
    weight, hidden = seeded((12, 64), dtype, 1) / 8, seeded((40, 64), dtype, 2)
    with torch.inference_mode():
        _, wanted_weights, wanted_experts = router_of(family, normalize, weight)(hidden)
        linear = PackedLinear(weight, kernels=kernels_for(kernels))
        gate = Gate(linear, ExpertChoice(3, normalize=normalize, round_weights=family == "qwen3_moe"))
        experts, weights = gate(hidden)
    assert experts.dtype == torch.int64
    assert weights.dtype == torch.float32
    # Sums in another order: in bfloat16 a logit may round the other way, and near ties then change places.
    same = (experts == wanted_experts).all(dim=1)
    assert same.float().mean() >= (1.0 if dtype == torch.float32 else 0.85)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert torch.allclose(weights[same], wanted_weights[same].float(), atol=tolerance)
    if family == "qwen3_moe":
        assert torch.equal(weights, weights.to(dtype).float()), "rounded as its own model rounds them"


def test_weights_fall_and_normalized_ones_sum_to_one() -> None:
    gate = Gate(PackedLinear(seeded((12, 64), torch.float32, 1), kernels=None), ExpertChoice(5, True, False))
    experts, weights = gate(seeded((30, 64), torch.float32, 2))
    assert (weights[:, 1:] <= weights[:, :-1]).all()
    assert torch.allclose(weights.sum(-1), torch.ones(30))
    assert all(len(set(row)) == 5 for row in experts.tolist())


@pytest.mark.parametrize("kernels", KERNEL_CHOICES)
def test_a_token_goes_where_it_goes_whoever_comes_along(kernels: str) -> None:
    linear = PackedLinear(seeded((12, 64), torch.float32, 1), kernels=kernels_for(kernels))
    gate = Gate(linear, ExpertChoice(3, True, False))
    hidden = seeded((33, 64), torch.float32, 2)
    experts, weights = gate(hidden)
    for row in (0, 7, 32):
        alone_experts, alone_weights = gate(hidden[row : row + 1])
        assert torch.equal(alone_experts[0], experts[row])
        assert torch.equal(alone_weights[0], weights[row])
