from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from common.compute.gated_ffn import GatedExpert, grouped_gated_ffn
from tests.support.nodes.kernels import KERNEL_CHOICES, kernels_for

DTYPES = (torch.float32, torch.bfloat16)
SIZES = ((64, 48), (33, 70), (256, 1))


def weights(model_width: int, expert_width: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((expert_width, model_width), (expert_width, model_width), (model_width, expert_width))
    return [(torch.randn(*shape, generator=generator) / shape[1] ** 0.5).to(dtype) for shape in shapes]


def rows(count: int, model_width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, model_width, generator=torch.Generator().manual_seed(99)).to(dtype)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize(("model_width", "expert_width"), SIZES)
def test_float32_result_is_that_of_exact_arithmetic(choice: str, model_width: int, expert_width: int) -> None:
    gate, up, down = weights(model_width, expert_width, torch.float32, seed=1)
    x = rows(20, model_width, torch.float32)
    result = grouped_gated_ffn(x, [0, 20], [GatedExpert(gate, up, down, kernels=kernels_for(choice))])
    wide = x.double()
    exact = (functional.silu(wide @ gate.double().T) * (wide @ up.double().T)) @ down.double().T
    assert (result.double() - exact).abs().max() <= 2e-6 * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize(("model_width", "expert_width"), SIZES)
def test_bf16_intermediates_are_rounded_as_the_reference_rounds(
    choice: str, model_width: int, expert_width: int
) -> None:
    gate, up, down = weights(model_width, expert_width, torch.bfloat16, seed=1)
    x = rows(200, model_width, torch.bfloat16)
    result = grouped_gated_ffn(x, [0, 200], [GatedExpert(gate, up, down, kernels=kernels_for(choice))])
    reference = functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)
    # Only where fp32 sums of another order straddle a rounding boundary may they differ.
    assert (result != reference).float().mean() < 0.02


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_keeps_its_bits_whoever_shares_the_call(choice: str, dtype: torch.dtype) -> None:
    experts = [GatedExpert(*weights(96, 70, dtype, seed), kernels=kernels_for(choice)) for seed in range(4)]
    x = rows(131, 96, dtype)
    offsets = [0, 3, 3, 90, 131]
    together = grouped_gated_ffn(x, offsets, experts)
    for expert, start, stop in zip(experts, offsets, offsets[1:], strict=False):
        for first in range(start, stop, 7):
            for count in (1, 2, 17):
                last = min(first + count, stop)
                alone = grouped_gated_ffn(x[first:last], [0, last - first], [expert])
                assert torch.equal(alone, together[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 8])
def test_number_of_threads_changes_no_bits(dtype: torch.dtype, groups: int) -> None:
    x = rows(groups * 60, 96, dtype)
    results = []
    for threads in (1, 3):
        kernels = kernels_for("native", threads)
        experts = [GatedExpert(*weights(96, 300, dtype, seed), kernels=kernels) for seed in range(groups)]
        results.append(grouped_gated_ffn(x, range(0, groups * 60 + 1, 60), experts))
    assert torch.equal(*results)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
def test_slices_of_an_expert_may_differ_in_width(choice: str) -> None:
    gate, up, down = weights(32, 50, torch.float32, seed=1)
    whole = GatedExpert(gate, up, down, kernels=kernels_for(choice))
    slices = [
        GatedExpert(gate[part], up[part], down[:, part], kernels=kernels_for(choice))
        for part in (slice(0, 20), slice(20, 50))
    ]
    x = rows(3, 32, torch.float32)
    parts = grouped_gated_ffn(torch.cat((x, x)), [0, 3, 6], slices)
    torch.testing.assert_close(parts[:3] + parts[3:], grouped_gated_ffn(x, [0, 3], [whole]))


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
def test_extreme_gates_neither_overflow_nor_go_missing(choice: str) -> None:
    one = torch.ones(1, 1)
    expert = GatedExpert(one, one, one, kernels=kernels_for(choice))
    x = torch.tensor([[-200.0], [-88.0], [0.0], [88.0], [200.0]])
    torch.testing.assert_close(grouped_gated_ffn(x, [0, 5], [expert]), functional.silu(x) * x)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
def test_what_does_not_fit_is_refused(choice: str) -> None:
    expert = GatedExpert(*weights(32, 16, torch.float32, seed=1), kernels=kernels_for(choice))
    x = rows(3, 32, torch.float32)
    with pytest.raises(ValueError, match="offsets"):
        grouped_gated_ffn(x, [0, 2], [expert])
    with pytest.raises(ValueError, match=r"\[R, 32\]"):
        grouped_gated_ffn(x[:, :31], [0, 3], [expert])
    with pytest.raises(ValueError, match="group 1"):
        grouped_gated_ffn(x, [0, 3, 2, 3], [expert, expert, expert])
    with pytest.raises(ValueError, match="gated expert"):
        GatedExpert(torch.ones(4, 8), torch.ones(4, 8), torch.ones(4, 8), kernels=kernels_for(choice))
    assert grouped_gated_ffn(x[:0], [0], []).shape == (0, 32)
