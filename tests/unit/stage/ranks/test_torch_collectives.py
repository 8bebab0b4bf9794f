"""What ranks get from torch.distributed, and where."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import DeviceError, RankLostError
from services.stage.ranks import torch_collectives
from services.stage.ranks.collectives import Barrier, TpExchange, choose_collectives
from services.stage.ranks.shared_channel import SharedChannel, SharedMemory
from services.stage.ranks.torch_collectives import TorchCollectives, open_store
from tests.support.nodes.collective_ranks import assert_collectives, results_of_ranks
from tests.support.nodes.kernels import kernels_for


def test_each_rank_gets_by_gloo_what_the_collective_promises(tmp_path: Path) -> None:
    assert_collectives(results_of_ranks(["cpu", "cpu"], tmp_path))


def test_after_a_rank_has_not_come_the_next_group_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_collectives, "TIMEOUT", timedelta(seconds=0.5))
    with pytest.raises(RankLostError):
        TorchCollectives(open_store(), 0, 2)
    assert dist.distributed_c10d._world.group_count == 0, "a process that starts anew looks for group 0"
    collectives = TorchCollectives(open_store(), 0, 1)
    assert torch.equal(collectives.all_gather(torch.ones(2, 3)), torch.ones(2, 3))
    collectives.close()


def connect_unless_lost(
    monkeypatch: pytest.MonkeyPatch, connect: Callable[[], None], is_lost: Callable[[], bool] = lambda: False
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    monkeypatch.setattr(torch_collectives, "CONNECTED_S", 0.2)
    torch_collectives._run_unless_lost(connect, torch.device("cuda", 0), is_lost)


def test_a_rank_that_is_lost_while_nccl_connects_ends_the_process_and_not_the_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(DeviceError, match="NCCL waits for a rank that is lost"):
        connect_unless_lost(monkeypatch, lambda: time.sleep(60), lambda: True)


def test_what_nccl_says_while_it_connects_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> None:
        raise RuntimeError("Duplicate GPU detected")

    connect_unless_lost(monkeypatch, lambda: None, lambda: True)
    with pytest.raises(RuntimeError, match="Duplicate GPU"):
        connect_unless_lost(monkeypatch, refuses)


def test_a_failure_of_ones_own_gpu_is_not_taken_for_a_lost_rank() -> None:
    with pytest.raises(DeviceError), torch_collectives._losing_ranks():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RankLostError), torch_collectives._losing_ranks():
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("setting", "is_on_host", "have_own_gpus", "kind"),
    [
        ("auto", True, True, "board"),
        ("auto", False, False, "board"),
        ("auto", False, True, "nccl"),
        ("gloo", False, True, "gloo"),
        ("board", False, True, "board"),
    ],
)
def test_auto_is_nccl_where_each_rank_has_a_gpu(setting: str, is_on_host: bool, have_own_gpus: bool, kind: str) -> None:
    assert choose_collectives(setting, is_on_host=is_on_host, have_own_gpus=have_own_gpus) == kind


def test_an_exchange_whose_new_group_does_not_come_about_has_none_that_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[int] = []

    class Joined:
        def __init__(self, store: Any, rank: int, *arguments: Any) -> None:
            if store == "nobody":
                raise RankLostError("a rank has not come")
            self.rank = rank

        def close(self) -> None:
            closed.append(self.rank)

    monkeypatch.setattr(torch_collectives, "TorchCollectives", Joined)
    kernels = kernels_for("native")
    assert kernels is not None
    memory = SharedMemory.create(SharedChannel.num_bytes(1 << 16), "test-exchange")
    channel = SharedChannel(memory, 1 << 16, kernels)
    exchange = TpExchange(channel, "gloo")
    barrier = Barrier(channel, (0, 1), 0, 1, lambda name, seat, value: None)
    store: Any = "all"
    exchange.join(barrier, store, lambda: False)
    nobody: Any = "nobody"
    for _ in range(2):
        with pytest.raises(RankLostError):
            exchange.join(barrier, nobody, lambda: False)
    assert closed == [0]
