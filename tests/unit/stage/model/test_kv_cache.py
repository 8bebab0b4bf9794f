"""What one memory gives, another one takes, bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from common.compute.native_library import NativeKernels, load_native_kernels
from services.stage.model.kv_cache import (
    PROBE_BLOCKS,
    LocalKv,
    PagedMemory,
    allocate_paged_memory,
    positions_of_blocks,
)
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, write_kv
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.simulated_gpu import hidden_waits, simulated_gpu

__all__ = ["one_torch_thread"]
LAYERS, BLOCKS, HEADS, WIDTH, MODEL = 2, 4, 2, 16, 24


def memory(dtype: torch.dtype, kernels: NativeKernels | None = None, *, with_log: bool = True) -> PagedMemory:
    allocate_kv = partial(LocalKv.allocate, kernels=kernels)
    return allocate_paged_memory(
        LAYERS, BLOCKS, (HEADS, WIDTH), MODEL, dtype, with_log=with_log, allocate_kv=allocate_kv
    )


def filled(dtype: torch.dtype, positions: torch.Tensor, *, with_log: bool = True) -> PagedMemory:
    made = memory(dtype, with_log=with_log)
    generator = torch.Generator().manual_seed(1)
    for cache in made.caches:
        key, value = (torch.randn(len(positions), HEADS, WIDTH, generator=generator).to(dtype) for _ in range(2))
        write_kv(key, value, cache, positions, kernels=None)
    made.log_hidden(positions, torch.randn(len(positions), MODEL, generator=generator).to(dtype))
    return made


def assert_equal(first: PagedMemory, second: PagedMemory) -> None:
    for one, other in zip(first.caches, second.caches, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    assert torch.equal(first.log, second.log)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_log", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_rows_come_out_as_they_went_in(dtype: torch.dtype, with_log: bool, native: bool) -> None:
    positions = torch.tensor([3, 0, 35, 127])
    source = filled(dtype, positions, with_log=with_log)
    copy = memory(dtype, load_native_kernels(threads=1) if native else None, with_log=with_log)
    copy.put_rows(positions, source.rows(positions))
    assert_equal(source, copy)


@pytest.mark.parametrize("with_log", [True, False])
def test_whole_blocks_come_out_as_they_went_in(with_log: bool) -> None:
    positions = torch.tensor([3, 35, 64])
    source = filled(torch.bfloat16, positions, with_log=with_log)
    copy = memory(torch.bfloat16, with_log=with_log)
    used = positions_of_blocks(torch.tensor([2, 0, 1]))
    assert used.tolist() == [*range(64, 96), *range(64)]
    copy.put_rows(used, source.rows(used))
    assert_equal(source, copy)


def test_the_log_gives_what_was_sent_on() -> None:
    made = memory(torch.float32)
    hidden = torch.arange(2 * MODEL, dtype=torch.float32).view(2, MODEL)
    made.log_hidden(torch.tensor([70, 1]), hidden)
    assert torch.equal(made.logged(torch.tensor([1, 70])), hidden.flip(0))


def test_a_block_that_the_router_does_not_know_is_there_for_self_tests() -> None:
    made = memory(torch.float32)
    assert made.num_blocks == BLOCKS
    assert made.caches[0].num_blocks == BLOCKS + PROBE_BLOCKS
    assert made.log.shape == ((BLOCKS + PROBE_BLOCKS) * KV_BLOCK_TOKENS, MODEL)
    assert not memory(torch.float32, with_log=False).has_log


def test_what_a_memory_on_a_gpu_gives_one_on_the_host_takes_and_the_other_way_round() -> None:
    """As a mirror gets it: rows travel as host tensors."""
    positions, used = torch.tensor([3, 35, 64]), positions_of_blocks(torch.tensor([2, 0, 1]))
    source = filled(torch.bfloat16, positions)
    with simulated_gpu() as device:
        there = allocate_paged_memory(
            LAYERS,
            BLOCKS,
            (HEADS, WIDTH),
            MODEL,
            torch.bfloat16,
            with_log=True,
            allocate_kv=partial(LocalKv.allocate, device=device),
        )
        assert there.caches[0].keys.device.type == "cuda"
        assert there.log.device.type == "cpu"
        there.put_rows(positions, source.rows(positions))
        by_rows, by_blocks = memory(torch.bfloat16), memory(torch.bfloat16)
        by_rows.put_rows(positions, there.rows(positions))
        there.put_rows(used, source.rows(used))
        by_blocks.put_rows(used, there.rows(used))
        assert there.num_bytes == source.num_bytes
        assert hidden_waits() == []
    assert_equal(source, by_rows)
    assert_equal(source, by_blocks)
