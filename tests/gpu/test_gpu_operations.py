"""A row keeps its bits in any company on this GPU: what the numeric rule takes for granted of CUDA's libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from common.compute.cuda import CudaDevice
from common.compute.expert_choice import ExpertChoice
from common.compute.gated_ffn import GatedExpert
from common.compute.linear import DEVICE_ROWS, PackedLinear
from common.compute.rms_norm import rms_norm
from common.compute.torch_functions import exponential, folded_softmax, folded_sum, silu
from services.stage.model.layer_half.composed import Gate
from services.stage.model.paged_attention import (
    KV_BLOCK_TOKENS,
    AttendingRows,
    KvShape,
    LayerKvCache,
    allocate_kv_cache,
    paged_attention,
    write_kv,
)

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16)
MOST = 300
COUNTS = (1, 2, 3, 8, 17, DEVICE_ROWS - 1, DEVICE_ROWS, DEVICE_ROWS + 1, 130, MOST)
SIZES = ((1, 1), (65, 33), (96, 1024), (1536, 4096), (4096, 1536), (70, 4096), (257, 513), (32000, 512))
RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rows_keep_their_bits(operation: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """At every count and three places, and once more at the end."""
    together = operation(x)
    for count in COUNTS:
        for first in {0, (len(x) - count) // 2, len(x) - count}:
            assert torch.equal(operation(x[first : first + count]), together[first : first + count]), (count, first)
    assert torch.equal(operation(x), together)
    result: Tensor = together.cpu()
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_linear(gpu: CudaDevice, dtype: torch.dtype, n: int, k: int) -> None:
    weight, bias, x = random(n, k, dtype=dtype), random(n, dtype=dtype, seed=1), random(MOST, k, dtype=dtype, seed=2)
    for given in (None, bias):
        linear = PackedLinear(weight.to(gpu.place), None if given is None else given.to(gpu.place), kernels=None)
        result = assert_rows_keep_their_bits(linear, x.to(gpu.place))
        exact = x.double() @ weight.double().T + (0 if given is None else given.double())
        assert (result.double() - exact).abs().max() <= RELATIVE_ERROR[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_place_within_a_product_is_nothing_to_it(gpu: CudaDevice, dtype: torch.dtype) -> None:
    linear = PackedLinear(random(1536, 2048, dtype=dtype).to(gpu.place), kernels=None)
    x = random(DEVICE_ROWS, 2048, dtype=dtype, seed=1).to(gpu.place)
    together = linear(x)
    for shift in range(1, DEVICE_ROWS):
        assert torch.equal(linear(x.roll(shift, 0)), together.roll(shift, 0)), shift


@pytest.mark.parametrize("dtype", DTYPES)
def test_expert(gpu: CudaDevice, dtype: torch.dtype) -> None:
    shapes = ((768, 2048), (768, 2048), (2048, 768))
    weights = [random(*shape, dtype=dtype, seed=seed).to(gpu.place) for seed, shape in enumerate(shapes)]
    expert = GatedExpert(*weights, kernels=None)
    assert_rows_keep_their_bits(expert, random(MOST, 2048, dtype=dtype, seed=9).to(gpu.place))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 90, 2048, 4096])
def test_norm_and_row_sums(gpu: CudaDevice, dtype: torch.dtype, width: int) -> None:
    x, weight = random(MOST, width, dtype=dtype).to(gpu.place), random(width, dtype=dtype, seed=1).to(gpu.place)
    assert_rows_keep_their_bits(lambda rows: rms_norm(rows, weight, 1e-6, kernels=None), x)
    assert_rows_keep_their_bits(folded_sum, x.float())
    assert_rows_keep_their_bits(folded_softmax, x.float())


def test_exp_and_silu_of_a_value_are_the_same_at_any_place(gpu: CudaDevice) -> None:
    for width in (1, 7, 1000, 4097):
        x = random(MOST, width).to(gpu.place)
        assert_rows_keep_their_bits(exponential, x)
        assert_rows_keep_their_bits(silu, x)


@pytest.mark.parametrize("num_experts", [8, 128, 512])
def test_gate(gpu: CudaDevice, num_experts: int) -> None:
    linear = PackedLinear(random(num_experts, 512, dtype=torch.bfloat16).to(gpu.place), kernels=None)
    gate = Gate(linear, ExpertChoice(8, normalize=True, round_weights=True))
    x = random(MOST, 512, dtype=torch.bfloat16, seed=1).to(gpu.place)
    assert_rows_keep_their_bits(lambda rows: gate(rows)[0], x)
    assert_rows_keep_their_bits(lambda rows: gate(rows)[1], x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 50])
def test_attention(gpu: CudaDevice, dtype: torch.dtype, window: int) -> None:
    """One sequence, whole and in chunks, alone and beside another; against float64."""
    tokens, heads, kv_heads, width = MOST, 8, 2, 64
    query, key, value = (random(tokens, h, width, dtype=dtype, seed=h + s) for s, h in enumerate((heads, 2, 2)))
    num_blocks = -(-tokens // KV_BLOCK_TOKENS)
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5)).to(torch.int32)
    shape = KvShape(1, num_blocks, kv_heads, width, dtype)
    cache: LayerKvCache = allocate_kv_cache(shape, partial(torch.zeros, device=gpu.place))[0]
    at = torch.arange(tokens)
    slots = table[at // KV_BLOCK_TOKENS].long() * KV_BLOCK_TOKENS + at % KV_BLOCK_TOKENS
    keys_there, values_there, slots_there = gpu.to_device(key, value, slots)
    write_kv(keys_there, values_there, cache, slots_there, kernels=None)

    def attended(positions: Tensor) -> Tensor:
        rows = torch.zeros(len(positions), dtype=torch.int32)
        given = gpu.to_device(query[positions.long()], table[None], rows, positions)
        return gpu.to_host(
            paged_attention(
                given[0],
                cache,
                AttendingRows(given[1], given[2], given[3], positions),
                scale=width**-0.5,
                sliding_window=window,
                kernels=None,
            )
        )[0]

    positions = at.to(torch.int32)
    whole = assert_rows_keep_their_bits(attended, positions)
    seen = at[None] <= at[:, None]
    if window:
        seen &= at[None] > at[:, None] - window
    keys, values = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    scores = torch.einsum("thd,shd->hts", query.double(), keys) * width**-0.5
    exact = torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    assert (whole.double() - exact).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
