"""What a tier gives back is what it was given, bit for bit, wherever K and V are."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from common.compute.device import Device
from common.errors import ProtocolError
from common.messages import NO_PAIRS
from common.wire.array import array_to_frame
from services.stage.model.kv_cache import LocalKv, PagedMemory, Rows, allocate_paged_memory
from services.stage.model.paged_attention import KV_BLOCK_TOKENS
from services.stage.slot.session_tier import DEVICE_BLOCKS, DeviceTier, HostTier, make_session_tier, read_pairs
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.simulated_gpu import simulated_gpu

__all__ = ["one_torch_thread"]
LAYERS, BLOCKS, HEADS, WIDTH, MODEL = 2, 6, 2, 16, 24


def filled(dtype: torch.dtype, *, with_log: bool = True) -> PagedMemory:
    made = allocate_paged_memory(LAYERS, BLOCKS, (HEADS, WIDTH), MODEL, dtype, with_log=with_log)
    generator = torch.Generator().manual_seed(1)
    for cache in made.caches:
        for part in (cache.keys, cache.values):
            part.copy_(torch.randn(part.shape, generator=generator))
    made.log.copy_(torch.randn(made.log.shape, generator=generator))
    return made


def content(memory: PagedMemory, block_id: int) -> list[torch.Tensor]:
    rows = memory.rows(torch.arange(block_id * KV_BLOCK_TOKENS, (block_id + 1) * KV_BLOCK_TOKENS))
    return [rows.keys, rows.values, rows.hidden]


def assert_is(memory: PagedMemory, block_id: int, wanted: list[torch.Tensor]) -> None:
    for part, other in zip(content(memory, block_id), wanted, strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_log", [True, False])
@pytest.mark.parametrize("kind", [HostTier, DeviceTier])
def test_blocks_come_back_elsewhere_as_they_went(
    dtype: torch.dtype, with_log: bool, kind: type[HostTier] | type[DeviceTier]
) -> None:
    memory = filled(dtype, with_log=with_log)
    before = [content(memory, block_id) for block_id in range(BLOCKS)]
    tier = kind(memory, 3, since=7)
    assert (tier.num_slots, tier.since) == (3, 7)
    tier.save([1, 4], [2, 0])
    tier.save([5], [1])
    tier.restore([0, 2], [1, 3])
    tier.restore([1], [0])
    for block_id, origin in ((0, 5), (1, 4), (2, 2), (3, 1), (4, 4), (5, 5)):
        assert_is(memory, block_id, before[origin])


def test_blocks_of_a_device_go_to_the_host_and_back() -> None:
    with simulated_gpu() as device:
        memory = on_device(device)
        rows = memory.rows(torch.arange(KV_BLOCK_TOKENS))
        tier = make_session_tier(memory, 2, 0)
        assert isinstance(tier, DeviceTier)
        tier.save([0], [1])
        tier.restore([1], [2])
        assert_is(memory, 2, [rows.keys, rows.values, rows.hidden])


def test_what_copies_go_through_has_room_for_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2 * DEVICE_BLOCKS + 1
    memory = allocate_paged_memory(LAYERS, count, (HEADS, WIDTH), MODEL, torch.float32, with_log=True)
    for cache in memory.caches:
        cache.keys.copy_(torch.randn(cache.keys.shape))
    wanted = [content(memory, block_id) for block_id in range(count)]
    sizes = list[int]()
    rows, put_rows = memory.rows, memory.put_rows

    def counted_rows(positions: torch.Tensor) -> Rows:
        sizes.append(len(positions))
        return rows(positions)

    def counted_put_rows(positions: torch.Tensor, given: Rows) -> None:
        sizes.append(len(positions))
        put_rows(positions, given)

    monkeypatch.setattr(memory, "rows", counted_rows)
    monkeypatch.setattr(memory, "put_rows", counted_put_rows)
    tier = DeviceTier(memory, count, 0)
    tier.save(range(count), range(count))
    tier.restore(range(count), range(count)[::-1])
    assert max(sizes) == DEVICE_BLOCKS * KV_BLOCK_TOKENS
    monkeypatch.undo()
    for block_id in range(count):
        assert_is(memory, count - 1 - block_id, wanted[block_id])


def on_device(device: Device) -> PagedMemory:
    memory = allocate_paged_memory(
        LAYERS,
        BLOCKS,
        (HEADS, WIDTH),
        MODEL,
        torch.float32,
        with_log=True,
        allocate_kv=partial(LocalKv.allocate, device=device),
    )
    positions = torch.arange(KV_BLOCK_TOKENS)
    memory.put_rows(positions, filled(torch.float32).rows(positions))
    return memory


def test_a_step_that_names_a_place_that_is_not_there_is_refused() -> None:
    def pairs(*wanted: tuple[int, int]) -> list[tuple[int, int]]:
        return read_pairs(array_to_frame(np.array(wanted, dtype=np.int32)), (4, 2), "Step.saves")

    assert pairs((3, 1), (0, 0)) == [(3, 1), (0, 0)]
    assert read_pairs(NO_PAIRS, (0, 0), "Step.saves") == []
    for wrong in ((4, 0), (0, 2), (-1, 0)):
        with pytest.raises(ProtocolError, match=r"Step\.saves"):
            pairs((0, 0), wrong)
