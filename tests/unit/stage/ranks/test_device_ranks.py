"""Ranks on devices: each has K and V of its own heads, and a smaller group has the bits of the full one.

On plain memory with a device's copies, and on a simulated GPU; the arithmetic is torch's on fixed shapes in both.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from common.compute.device import Device, StagedDevice
from common.errors import CapacityError, DeviceError, RankLostError
from common.node.loader_thread import LoaderThread
from services.stage.model.decoder import ExpertCall
from services.stage.model.kv_cache import KvStore, LocalKv, PagedMemory, positions_of_blocks
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, LayerKvCache
from services.stage.ranks import worker
from services.stage.ranks.kv_memory import WINDOW_ROWS, RankKv
from services.stage.slot.session_tier import make_session_tier
from tests.support.checkpoints.tiny_checkpoints import MIXTRAL_SLIDING_TIED, QWEN3, Recipe, write_checkpoint
from tests.support.nodes.kernels import one_torch_thread  # noqa: F401
from tests.support.nodes.rank_threads import ThreadRanks, batch_of, finish, rank_threads
from tests.support.nodes.simulated_gpu import (
    NeverReached,
    SimulatedDevice,
    hidden_waits,
    simulated_gpu,
    within_simulation,
)
from tests.support.processes.waiting import wait_until
from tests.unit.stage.ranks.test_every_rank import RECIPES, two_steps, whole_role

ALL_BLOCKS = torch.arange(3)
ALL_ROWS = positions_of_blocks(ALL_BLOCKS)
Result = list[torch.Tensor]


def plain_device() -> Device:
    return StagedDevice(torch.device("cpu"))


@contextmanager
def device_ranks(
    checkpoint: Path,
    degree: int,
    new_device: Callable[[], Device] = plain_device,
    within: Callable[[], Any] = nullcontext,
    **settings: Any,
) -> Iterator[ThreadRanks]:
    with (
        within(),
        rank_threads(checkpoint, degree, new_device=new_device, within=within, **settings) as ranks,
        torch.inference_mode(),
    ):
        yield ranks


def computed(ranks: ThreadRanks, dtype: torch.dtype) -> Result:
    """Logits of a prefill and a decode step, and what is in all blocks then."""
    model = ranks.model(whole_role(ranks.config.num_layers), dtype)
    store = ranks.allocate(dtype)
    logits = two_steps(lambda batch: ranks.run(model, batch, store.caches), ranks.config.vocab_size)
    return [*logits, *store.rows(ALL_ROWS)]


def same(one: Result, other: Result) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_group_that_has_lost_ranks_gives_the_bits_of_the_full_one(recipe: Recipe, tmp_path: Path) -> None:
    with device_ranks(write_checkpoint(tmp_path, recipe), 4) as ranks:
        full = computed(ranks, recipe.dtype)
        assert ranks.group.degree == 4
        for lost, degree in ((3, 2), (1, 2), (2, 1)):
            ranks.lose(lost)
            ranks.group.reform()
            assert same(computed(ranks, recipe.dtype), full), degree
            assert ranks.group.degree == degree


@pytest.mark.parametrize("recipe", [QWEN3, MIXTRAL_SLIDING_TIED], ids=lambda recipe: recipe.name)
def test_what_ranks_compute_is_near_what_a_stage_without_them_computes(recipe: Recipe, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, recipe)
    with device_ranks(checkpoint, 1) as ranks:
        alone = computed(ranks, torch.float32)
    for degree in (2, 4):
        with device_ranks(checkpoint, degree) as ranks:
            for one, other in zip(computed(ranks, torch.float32), alone, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_on_a_gpu_no_rank_waits_but_where_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoaderThread, "_run", within_simulation(LoaderThread._run))
    checkpoint = write_checkpoint(tmp_path, QWEN3)
    with device_ranks(checkpoint, 2) as ranks:
        expected = computed(ranks, torch.float32)
    with device_ranks(checkpoint, 2, SimulatedDevice, simulated_gpu) as ranks:
        found = computed(ranks, torch.float32)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert all(cache.keys.device.type == "cuda" for cache in ranks.workers[1]._memory.caches)
        ranks.lose(1)
        ranks.group.reform()
        assert same(computed(ranks, torch.float32), found)
        assert hidden_waits() == []


def test_a_batch_that_waits_for_its_device_does_not_mend_what_another_one_has_broken(tmp_path: Path) -> None:
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        model = ranks.model(whole_role(ranks.config.num_layers), torch.float32)
        caches = ranks.allocate(torch.float32).caches
        lead = ranks.group.leader.lead
        waiting, breaking, next_one = (batch_of(torch.arange(3), 0, [block]) for block in range(3))
        waits = lead(model.forward(waiting, caches), waiting)
        assert not isinstance(waits.send(None), ExpertCall)
        with pytest.raises(ValueError, match="do not fit a cache"):
            finish(lead(model.forward(breaking, [LayerKvCache(caches[0].keys[:, :, :4], caches[0].values)]), breaking))
        assert isinstance(waits.send(None), ExpertCall)
        with pytest.raises(RankLostError, match="out of step"):
            finish(lead(model.forward(next_one, caches), next_one))
        ranks.group.reform()


@pytest.mark.parametrize("degree", [1, 4])
def test_rows_of_all_heads_come_out_as_they_went_in(degree: int, tmp_path: Path) -> None:
    """Also more of them than the window holds."""
    num_blocks = 2 * WINDOW_ROWS // KV_BLOCK_TOKENS + 3
    with device_ranks(write_checkpoint(tmp_path, QWEN3), degree) as ranks:
        ranks.model(whole_role(ranks.config.num_layers), torch.float32)
        store = ranks.allocate(torch.float32, num_blocks)
        plain = LocalKv.allocate(store.shape)
        generator = torch.Generator().manual_seed(1)
        whole = positions_of_blocks(torch.randperm(num_blocks, generator=generator))
        some = torch.randperm(num_blocks * KV_BLOCK_TOKENS, generator=generator)[: 2 * WINDOW_ROWS + 5]
        for positions in (whole, some):
            rows = [torch.randn(part.shape, generator=generator) for part in plain.rows(positions)]
            for each in (plain, store):
                each.put_rows(positions, *rows)
            assert same([*store.rows(positions)], rows)
        assert same([*store.rows(whole)], [*plain.rows(whole)])
        assert [part.shape for part in store.rows(positions[:0])] == [part.shape for part in plain.rows(positions[:0])]


def test_blocks_of_all_heads_go_to_a_session_tier_and_come_back(tmp_path: Path) -> None:
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 4) as ranks:
        ranks.model(whole_role(ranks.config.num_layers), torch.float32)
        store = ranks.allocate(torch.float32, 4)
        generator = torch.Generator().manual_seed(1)
        one, other = (positions_of_blocks(torch.tensor([block])) for block in (0, 3))
        rows = [torch.randn(part.shape, generator=generator) for part in store.rows(one)]
        store.put_rows(one, rows[0], rows[1])
        tier = make_session_tier(PagedMemory(store, torch.zeros((0, 1))), 2, 0)
        tier.save([0], [1])
        tier.restore([1], [3])
        assert same([*store.rows(other)], rows)


def change_over(ranks: ThreadRanks, store: KvStore, blocks: torch.Tensor) -> None:
    """Let those that have come meanwhile work too."""
    ranks.group.attach_present()
    load = ranks.group.begin_load(whole_role(ranks.config.num_layers), store.shape.dtype, replaces=False)
    while not ranks.group.is_loaded(load):
        pass
    ranks.group.change_over(load, 0, blocks)


def test_k_and_v_change_hands_when_the_group_grows(tmp_path: Path) -> None:
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 4) as ranks:
        for seat in (1, 2, 3):
            ranks.lose(seat)
        ranks.group.reform()
        ranks.model(whole_role(ranks.config.num_layers), torch.float32)
        store = ranks.allocate(torch.float32)
        held = [torch.randn(part.shape) for part in store.rows(ALL_ROWS)]
        store.put_rows(ALL_ROWS, *held)
        for seats, degree in (((1,), 2), ((2, 3), 4)):
            for seat in seats:
                ranks.start(seat)
            change_over(ranks, store, ALL_BLOCKS)
            assert ranks.group.degree == degree
            assert same([*store.rows(ALL_ROWS)], held)
            with torch.inference_mode(False):
                store.put_rows(ALL_ROWS, *[part.clone() for part in held])  # as a mirror does


def test_what_is_not_said_to_be_used_is_not_carried_over(tmp_path: Path) -> None:
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        ranks.lose(1)
        ranks.group.reform()
        ranks.model(whole_role(ranks.config.num_layers), torch.float32)
        store = ranks.allocate(torch.float32)
        held = [torch.randn(part.shape) for part in store.rows(ALL_ROWS)]
        store.put_rows(ALL_ROWS, *held)
        ranks.start(1)
        change_over(ranks, store, ALL_BLOCKS[1:2])
        of_block_1, after_it = slice(KV_BLOCK_TOKENS, 2 * KV_BLOCK_TOKENS), slice(2 * KV_BLOCK_TOKENS, None)
        assert same([*store.rows(ALL_ROWS[of_block_1])], [part[:, of_block_1] for part in held])
        assert not any(part.any() for part in store.rows(ALL_ROWS[after_it]))


def test_a_rank_has_given_its_old_memory_up_before_it_allocates_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a batch that nobody goes on with was under way."""
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        model = ranks.model(whole_role(ranks.config.num_layers), torch.float32)
        caches = ranks.allocate(torch.float32).caches
        batch = batch_of(torch.arange(3), 0, [0])
        forward = ranks.group.leader.lead(model.forward(batch, caches), batch)
        forward.send(None)
        other = ranks.workers[1]._memory
        wait_until(lambda: bool(ranks.workers[1]._forwards), 5, "that the rank has begun")
        forward.close()
        former = weakref.ref(other.caches[0].keys)
        is_gone: list[bool] = []
        allocate: Any = RankKv.allocate

        def watched(self: Any) -> None:
            if self is other:
                is_gone.append(former() is None)
            allocate(self)

        monkeypatch.setattr(RankKv, "allocate", watched)
        ranks.allocate(torch.float32)
        assert is_gone == [True]


def test_a_rank_without_room_says_so_and_nobody_keeps_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 4) as ranks:
        full = computed(ranks, torch.float32)
        crowded = ranks.workers[2]._memory
        allocate: Any = RankKv.allocate

        def allocate_or_not(self: Any) -> None:
            if self is crowded:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            allocate(self)

        monkeypatch.setattr(RankKv, "allocate", allocate_or_not)
        with pytest.raises(CapacityError, match=r"rank 2: the GPU has no room for it, .*CUDA out of memory"):
            ranks.allocate(torch.float32)
        monkeypatch.undo()
        memories = [each._memory for each in ranks.workers.values()]
        wait_until(lambda: not any(memory.caches for memory in memories), 10, "that all have given theirs up")
        assert same(computed(ranks, torch.float32), full), "the ranks go on"


def test_rank_0_without_room_says_so_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        full = computed(ranks, torch.float32)
        allocate: Any = LocalKv.allocate

        def allocate_or_not(shape: Any, kernels: Any, device: Any) -> LocalKv:
            if device is ranks.device:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            made: LocalKv = allocate(shape, kernels, device)
            return made

        monkeypatch.setattr(LocalKv, "allocate", allocate_or_not)
        with pytest.raises(torch.OutOfMemoryError):
            ranks.allocate(torch.float32)
        monkeypatch.undo()
        assert same(computed(ranks, torch.float32), full)


def test_a_rank_that_waits_for_its_device_hears_of_a_new_epoch_and_takes_part_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 4) as ranks:
        full = computed(ranks, torch.float32)
        device: Any = ranks.workers[1]._device
        hanging = device._new_buffer()
        hanging._marker = NeverReached()
        hanging.mark()
        device._downloads.append(hanging)
        store: Any = ranks.group._memory

        def move() -> None:
            store.rows(torch.arange(3))

        with ThreadPoolExecutor(1) as pool:
            stuck = pool.submit(move)
            time.sleep(0.1)
            assert not stuck.done(), "the rank waits for its device"
            ranks.lose(3)
            with pytest.raises(RankLostError):
                stuck.result(10)
        ranks.group.reform()
        assert ranks.group.leader.attached.keys() == {1, 2}, "the one that waited has heard of it"
        assert hanging not in device._downloads
        assert same(computed(ranks, torch.float32), full)


@pytest.mark.parametrize("where", ["load", "memory"])
def test_a_rank_whose_device_has_failed_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")

    with device_ranks(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        if where == "load":
            monkeypatch.setattr(worker, "load_stage", fails)
        else:
            monkeypatch.setattr(RankKv, "allocate", fails)
        with pytest.raises(RankLostError, match="seat 1 is gone"):
            computed(ranks, torch.float32)
        (ended_by,) = ranks.errors
        assert isinstance(ended_by, DeviceError)
        assert str(ended_by) == "the GPU has failed: CUDA error: device-side assert triggered"
        ranks.errors.clear()


def test_want_of_memory_for_weights_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with device_ranks(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        monkeypatch.setattr(worker, "load_stage", fails)
        with pytest.raises(CapacityError, match=r"rank 1: the GPU has no room for it, set CAPACITY_BYTES lower: CUDA"):
            computed(ranks, torch.float32)


def test_what_waits_for_a_device_hears_that_a_rank_is_lost(tmp_path: Path) -> None:
    """A kernel of NCCL waits for its peer on the device, where no channel tells of it."""
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        computed(ranks, torch.float32)
        ranks.device.while_waiting(0.1)
        ranks.lose(1)
        with pytest.raises(RankLostError, match="seat 1"):
            ranks.device.while_waiting(0.1)


def test_a_group_waits_for_the_lost_where_those_that_are_left_have_no_room(tmp_path: Path) -> None:
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        group = ranks.group
        full = computed(ranks, torch.float32)
        group._weight_bytes, group.capacity_bytes = 1000, 510 + group._kv_bytes // 2
        ranks.lose(1)
        threading.Timer(0.3, ranks.start, [1]).start()
        group.reform()
        said = [call.kwargs for call in ranks.log._logger.calls if call.kwargs["event"] == "waiting_for_ranks"]
        assert len(said) == 1, "once"
        assert said[0]["reason"].startswith("with 1 ranks each needs ")
        assert group.best() == 2
        assert same(computed(ranks, torch.float32), full)


def test_a_group_that_is_whole_waits_for_nobody(tmp_path: Path) -> None:
    """However little room there is: a broken pass is no lost rank."""
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        full = computed(ranks, torch.float32)
        ranks.group.capacity_bytes = 1
        ranks.group.leader.is_broken = True
        began_s = time.monotonic()
        ranks.group.reform()
        assert time.monotonic() - began_s < 5
        assert same(computed(ranks, torch.float32), full)


def test_a_group_does_not_wait_for_ever(tmp_path: Path) -> None:
    """Whether the slot fits is then found out by loading it."""
    with device_ranks(write_checkpoint(tmp_path, QWEN3), 2) as ranks:
        computed(ranks, torch.float32)
        ranks.group.capacity_bytes = 1
        ranks.lose(1)
        times_s = itertools.count()
        ranks.group.clock = lambda: float(next(times_s))
        ranks.group.reform()
        assert 30 < next(times_s) < 60
        assert ranks.group.best() == 1
