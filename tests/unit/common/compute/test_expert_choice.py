"""A gate's choice: the native kernel has torch's bits, on the same instructions."""

from __future__ import annotations

import pytest
import torch

from common.compute.expert_choice import ExpertChoice
from common.compute.native_library import NativeKernels, load_native_kernels, read_cpu_flags
from tests.support.nodes.kernels import kernels_for

# experts, experts a token: also one alone, all, more than a vector, and few of many, which torch sorts otherwise
COUNTS = ((32, 4), (8, 2), (128, 8), (60, 4), (1, 1), (5, 5), (64, 1), (12, 3), (17, 9), (40, 20), (512, 10))
ROWS = 3000


def same_instructions() -> NativeKernels:
    """Returns kernels of torch's own instruction set; skips the test where torch has one that they do not match."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = read_cpu_flags()
    if capability == "AVX2":
        flags = frozenset(flag for flag in flags if not flag.startswith("avx512"))
    kernels = load_native_kernels(cpu_flags=flags)
    if capability not in ("AVX512", "AVX2") or kernels is None or capability.lower() not in kernels.variant:
        pytest.skip("torch has other instructions than the kernels")
    return kernels


def logits_of(kind: str, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_experts)
    logits = torch.randn((ROWS, num_experts), generator=generator) * 4.0
    if kind == "with ties":
        logits = (logits / 2).round()
    if kind == "far apart":
        logits *= 40.0
    if kind == "not finite":
        logits[torch.rand(logits.shape, generator=generator) < 0.01] = torch.nan
        logits[torch.rand(logits.shape, generator=generator) < 0.01] = torch.inf
        logits[:, -1] = -torch.inf
    return logits.to(dtype)


@pytest.mark.parametrize("kind", ["usual", "with ties", "far apart", "not finite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "num_chosen"), COUNTS)
def test_native_choice_has_the_bits_of_torch(num_experts: int, num_chosen: int, dtype: torch.dtype, kind: str) -> None:
    kernels = same_instructions()
    logits = logits_of(kind, num_experts, dtype)
    for normalize in (False, True):
        for round_weights in (False, True):
            choice = ExpertChoice(num_chosen, normalize, round_weights)
            experts, weights = choice(logits, kernels=kernels)
            wanted_experts, wanted_weights = choice(logits, kernels=None)
            assert torch.equal(experts, wanted_experts)
            torch.testing.assert_close(weights, wanted_weights, rtol=0, atol=0, equal_nan=True)


def test_a_choice_of_more_experts_than_there_are_is_refused() -> None:
    kernels = kernels_for("native")
    with pytest.raises(ValueError, match="3 of 2 experts"):
        ExpertChoice(3, normalize=True, round_weights=False)(torch.zeros((1, 2)), kernels=kernels)


def test_logits_that_the_kernels_do_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        ExpertChoice(1, True, False)(torch.zeros((1, 2), dtype=torch.float16), kernels=kernels_for("native"))
