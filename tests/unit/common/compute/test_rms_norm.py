from __future__ import annotations

import pytest
import torch

from common.compute.rms_norm import add_rms_norm, rms_norm
from tests.support.nodes.kernels import KERNEL_CHOICES, kernels_for

EPSILON = 1e-6


def inputs(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    return (
        torch.randn(41, width, generator=generator).to(dtype),
        torch.randn(41, width, generator=generator).to(dtype),
        torch.randn(width, generator=generator).to(dtype),
    )


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return weight * wide.to(x.dtype)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 33, 64, 1024])
def test_norm_and_residual_sum_are_those_of_the_reference(choice: str, dtype: torch.dtype, width: int) -> None:
    x, residual, weight = inputs(width, dtype)
    kernels = kernels_for(choice)
    torch.testing.assert_close(rms_norm(x, weight, EPSILON, kernels=kernels), reference(x, weight))
    total, normed = add_rms_norm(residual, x, weight, EPSILON, kernels=kernels)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(total, weight, EPSILON, kernels=kernels))


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 33, 1024])
def test_row_keeps_its_bits_whoever_shares_the_call(choice: str, dtype: torch.dtype, width: int) -> None:
    x, _, weight = inputs(width, dtype)
    together = rms_norm(x, weight, EPSILON, kernels=kernels_for(choice))
    for first, count in ((0, 1), (7, 1), (7, 2), (20, 17)):
        alone = rms_norm(x[first : first + count], weight, EPSILON, kernels=kernels_for(choice))
        assert torch.equal(alone, together[first : first + count])


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
def test_what_does_not_fit_is_refused(choice: str) -> None:
    with pytest.raises(ValueError, match="RMSNorm"):
        rms_norm(torch.ones(2, 3), torch.ones(4), EPSILON, kernels=kernels_for(choice))
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.ones(1, 3), torch.ones(2, 3), torch.ones(3), EPSILON, kernels=kernels_for(choice))
