from __future__ import annotations

import pytest
import torch

from common.compute.linear import PackedLinear, pack_weights
from tests.support.nodes.kernels import KERNEL_CHOICES, kernels_for

ROW_COUNTS = (1, 2, 3, 5, 8, 17, 64, 130, 300)
SIZES = ((1, 1), (5, 7), (65, 33), (96, 1024), (130, 2048), (70, 4096), (6, 255), (257, 513))
DTYPES = (torch.float32, torch.bfloat16)
RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_result_is_that_of_exact_arithmetic_rounded_once(choice: str, dtype: torch.dtype, n: int, k: int) -> None:
    weight, bias, x = random(n, k, dtype=dtype), random(n, dtype=dtype, seed=1), random(19, k, dtype=dtype, seed=2)
    exact = x.double() @ weight.double().T + bias.double()
    y = PackedLinear(weight, bias, kernels=kernels_for(choice))(x)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= RELATIVE_ERROR[dtype] * exact.abs().max()


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_row_keeps_its_bits_whoever_shares_the_call(choice: str, dtype: torch.dtype, n: int, k: int) -> None:
    linear = PackedLinear(random(n, k, dtype=dtype), random(n, dtype=dtype), kernels=kernels_for(choice))
    x = random(max(ROW_COUNTS), k, dtype=dtype, seed=2)
    together = linear(x)
    for rows in ROW_COUNTS:
        for first in {0, (max(ROW_COUNTS) - rows) // 2, max(ROW_COUNTS) - rows}:
            assert torch.equal(linear(x[first : first + rows]), together[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bits(dtype: torch.dtype) -> None:
    weight, x = random(333, 777, dtype=dtype), random(65, 777, dtype=dtype, seed=2)
    alone = PackedLinear(weight, kernels=kernels_for("native"))
    shared = PackedLinear(weight, kernels=kernels_for("native", threads=3))
    for rows in (1, 65):
        assert torch.equal(alone(x[:rows]), shared(x[:rows]))


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_a_slice_of_something_wider(choice: str, dtype: torch.dtype) -> None:
    linear = PackedLinear(random(20, 33, dtype=dtype), kernels=kernels_for(choice))
    wide = random(9, 100, dtype=dtype, seed=2)
    assert torch.equal(linear(wide[:, 7:40]), linear(wide[:, 7:40].contiguous()))
    transposed = random(33, 9, dtype=dtype, seed=2).T
    assert torch.equal(linear(transposed), linear(transposed.contiguous()))


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
def test_weights_may_be_freed_once_packed(choice: str) -> None:
    weight = random(8, 8, dtype=torch.float32)
    linear = PackedLinear(weight, kernels=kernels_for(choice))
    x = torch.ones(1, 8)
    before = linear(x)
    weight.zero_()
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
def test_no_rows_give_no_rows(choice: str) -> None:
    assert PackedLinear(torch.ones(3, 4), kernels=kernels_for(choice))(torch.empty(0, 4)).shape == (0, 3)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
def test_what_does_not_fit_is_refused_with_both_shapes(choice: str) -> None:
    linear = PackedLinear(torch.ones(3, 4), kernels=kernels_for(choice))
    with pytest.raises(ValueError, match=r"\[T, 4\].*\(2, 5\)"):
        linear(torch.ones(2, 5))
    with pytest.raises(ValueError, match="bfloat16"):
        linear(torch.ones(2, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="float16"):
        PackedLinear(torch.ones(3, 4, dtype=torch.float16), kernels=kernels_for(choice))
    with pytest.raises(ValueError, match="bias"):
        PackedLinear(torch.ones(3, 4), torch.ones(4), kernels=kernels_for(choice))


def test_weights_that_are_packed_together_are_those_packed_alone() -> None:
    kernels = kernels_for("native")
    assert kernels is not None
    weights = [torch.randn(shape).to(torch.bfloat16) for shape in ((384, 1024), (70, 33), (1024, 384))]
    alone = [pack_weights((weight,), kernels)[0] for weight in weights]
    together = pack_weights(weights, kernels)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(packed.data_ptr() % 64 == 0 for packed in together)
