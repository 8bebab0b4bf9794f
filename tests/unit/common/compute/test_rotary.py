from __future__ import annotations

import pytest
import torch

from common.compute.rms_norm import rms_norm
from common.compute.rotary import apply_rotary
from tests.support.nodes.kernels import KERNEL_CHOICES, kernels_for

SHAPES = ((64, 64), (80, 20), (8, 8), (24, 24))


def inputs(width: int, turned: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    angles = torch.rand(9, turned // 2, generator=generator) * 100
    projection = torch.randn(9, 7, width, generator=generator)
    cosine, sine = angles.cos(), angles.sin()
    return projection.to(dtype), torch.cat((cosine, cosine), -1).to(dtype), torch.cat((-sine, sine), -1).to(dtype)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "turned"), SHAPES)
def test_bits_are_those_of_the_reference(choice: str, dtype: torch.dtype, width: int, turned: int) -> None:
    projection, cosine, sine = inputs(width, turned, dtype)
    query = projection[:, 2:6]  # a slice of a fused projection
    head, rest = query[..., :turned], query[..., turned:]
    low, high = head.chunk(2, dim=-1)
    plain_sine = sine[:, None, turned // 2 :].repeat(1, 1, 2)
    reference = torch.cat((head * cosine[:, None] + torch.cat((-high, low), -1) * plain_sine, rest), -1)
    assert torch.equal(apply_rotary(query, cosine, sine, kernels=kernels_for(choice)), reference)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_each_head_comes_first(choice: str, dtype: torch.dtype) -> None:
    kernels = kernels_for(choice)
    projection, cosine, sine = inputs(64, 64, dtype)
    weight = torch.rand(64, generator=torch.Generator().manual_seed(3)).to(dtype)
    normed = rms_norm(projection.reshape(-1, 64), weight, 1e-6, kernels=kernels).view(projection.shape)
    weights = weight.expand(7, 64)
    each = apply_rotary(projection, cosine, sine, norm_weight=weights, epsilon=1e-6, kernels=kernels)
    expected = apply_rotary(normed, cosine, sine, kernels=kernels)
    fused = apply_rotary(projection, cosine, sine, norm_weight=weight, epsilon=1e-6, kernels=kernels)
    assert torch.equal(fused, expected)
    assert torch.equal(each, expected)
    alone = apply_rotary(projection[4:5], cosine[4:5], sine[4:5], norm_weight=weight, epsilon=1e-6, kernels=kernels)
    assert torch.equal(alone, expected[4:5])


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
def test_what_does_not_fit_is_refused(choice: str) -> None:
    x = torch.ones(2, 1, 8)
    with pytest.raises(ValueError, match="cosine"):
        apply_rotary(x, torch.ones(2, 10), torch.ones(2, 10), kernels=kernels_for(choice))
    with pytest.raises(ValueError, match="norm weight"):
        apply_rotary(x, torch.ones(2, 8), torch.ones(2, 8), norm_weight=torch.ones(7), kernels=kernels_for(choice))
