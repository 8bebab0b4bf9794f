"""What a device computes by other code than the host: a row by itself, and right. On the simulated GPU, so that the
code is the GPU's and the arithmetic is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.compute.gated_ffn import GatedExpert, grouped_gated_ffn
from common.compute.linear import DEVICE_ROWS, DeviceLinear, PackedLinear
from common.compute.rms_norm import add_rms_norm, rms_norm
from common.compute.rotary import apply_rotary
from common.compute.torch_functions import folded_softmax, folded_sum, mean_of_squares
from tests.support.nodes.simulated_gpu import PLACE, hidden_waits, simulated_gpu

DTYPES = (torch.float32, torch.bfloat16)
MOST = 150
COUNTS = (1, 2, 17, DEVICE_ROWS, DEVICE_ROWS + 1, MOST)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_in_any_company(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The result for all rows, which any part of them has too."""
    with simulated_gpu() as device:
        (there,) = device.to_device(x)
        whole = device.to_host(operation(there))[0]
        for count in COUNTS:
            for first in {0, (len(x) - count) // 2, len(x) - count}:
                part = device.to_host(operation(there[first : first + count]))[0]
                assert torch.equal(part, whole[first : first + count])
        assert hidden_waits() == []
    return whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (65, 33), (70, 700), (96, 1024)])
def test_linear(dtype: torch.dtype, n: int, k: int) -> None:
    weight, bias, x = random(n, k, dtype=dtype), random(n, dtype=dtype, seed=1), random(MOST, k, dtype=dtype, seed=2)
    with simulated_gpu():
        linear = PackedLinear(weight.to(PLACE), bias.to(PLACE), kernels=None)
    result = same_in_any_company(linear, x)
    exact = x.double() @ weight.double().T + bias.double()
    assert result.dtype == dtype
    assert (result.double() - exact).abs().max() <= (2e-6 if dtype == torch.float32 else 5e-3) * exact.abs().max()


def test_linear_takes_slices_and_no_rows() -> None:
    linear = DeviceLinear(random(20, 33), None)
    wide = random(9, 100)
    assert torch.equal(linear(wide[:, 7:40]), linear(wide[:, 7:40].contiguous()))
    assert linear(wide[:0, 7:40]).shape == (0, 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_with_the_addition_before_it(dtype: torch.dtype) -> None:
    x, weight = random(MOST, 90, dtype=dtype), random(90, dtype=dtype, seed=1)
    with simulated_gpu():
        there = weight.to(PLACE)
    result = same_in_any_company(lambda rows: rms_norm(rows, there, 1e-6, kernels=None), x)
    expected = rms_norm(x, weight, 1e-6, kernels=None)
    torch.testing.assert_close(result, expected)
    total = same_in_any_company(lambda rows: add_rms_norm(rows, rows, there, 1e-6, kernels=None)[1], x)
    torch.testing.assert_close(total, add_rms_norm(x, x, weight, 1e-6, kernels=None)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_with_the_norm_of_heads_before_it(dtype: torch.dtype) -> None:
    heads, width = 3, 16
    x, weight, angles = (
        random(MOST, heads * width, dtype=dtype),
        random(width, dtype=dtype, seed=1),
        random(1, width, dtype=dtype, seed=2),
    )

    def turned(rows: Tensor, angle: Tensor, norm: Tensor) -> Tensor:
        angle = angle.expand(len(rows), -1)
        return apply_rotary(
            rows.view(-1, heads, width), angle, angle, norm_weight=norm, epsilon=1e-6, kernels=None
        ).flatten(1)

    with simulated_gpu():
        norm, angle = weight.to(PLACE), angles.to(PLACE)
    result = same_in_any_company(lambda rows: turned(rows, angle, norm), x)
    torch.testing.assert_close(result, turned(x, angles, weight))


@pytest.mark.parametrize("width", [1, 2, 7, 64, 90])
def test_folds_are_sums_means_and_softmaxes(width: int) -> None:
    x = random(MOST, width)
    torch.testing.assert_close(same_in_any_company(folded_sum, x), x.sum(-1, keepdim=True), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same_in_any_company(folded_softmax, 30 * x), (30 * x).softmax(-1))
    torch.testing.assert_close(same_in_any_company(mean_of_squares, x), (x * x).mean(-1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype: torch.dtype) -> None:
    weights = [[random(*shape, dtype=dtype, seed=s) for s, shape in enumerate(((24, 32), (24, 32), (32, 24)), 3 * e)]
               for e in range(2)]  # fmt: skip
    x = random(MOST, 32, dtype=dtype, seed=9)
    with simulated_gpu():
        experts = [GatedExpert(*(one.to(PLACE) for one in three), kernels=None) for three in weights]
    for expert, three in zip(experts, weights, strict=True):
        result = same_in_any_company(expert, x)
        torch.testing.assert_close(result, GatedExpert(*three, kernels=None)(x), atol=1e-2, rtol=2e-2)
    with simulated_gpu() as device:
        (there,) = device.to_device(x)
        (grouped,) = device.to_host(grouped_gated_ffn(there, (0, 40, MOST), experts))
        (first,) = device.to_host(experts[0](there[:40]))
        (second,) = device.to_host(experts[1](there[40:]))
    assert torch.equal(grouped, torch.cat((first, second)))
