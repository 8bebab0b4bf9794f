"""What ranks get from torch.distributed, and where."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.errors import RankLostError
from services.stage.ranks import torch_collectives
from services.stage.ranks.board import RankBoard
from services.stage.ranks.collectives import BoardCollectives, Collectives, Meeting
from services.stage.ranks.conductor import Conductor
from services.stage.ranks.cut import RankCut
from services.stage.ranks.shared_memory import SharedMemory
from services.stage.ranks.torch_collectives import TorchCollectives, open_store
from tests.support.collective_ranks import assert_collectives, results_of_ranks
from tests.support.kernels import kernels_for
from tests.support.rank_threads import ThreadStaff


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


def test_a_conductor_whose_new_collectives_do_not_come_about_has_none_that_are_closed() -> None:
    class Closing(BoardCollectives):
        closed = 0

        def close(self) -> None:
            Closing.closed += 1

    def lose(meeting: Meeting) -> Collectives:
        raise RankLostError("a rank has not come")

    kernels = kernels_for("native")
    assert kernels is not None
    board = RankBoard(SharedMemory.create(RankBoard.num_bytes(1 << 16), "test-conductor"), 1 << 16, kernels)
    conductor = Conductor(board, ThreadStaff())
    conductor.use(RankCut(), (0,), torch.float32, lambda meeting: Closing(board, 0, 1, meeting))
    for _ in range(2):
        with pytest.raises(RankLostError):
            conductor.use(RankCut(), (0,), torch.float32, lose)
    assert Closing.closed == 1
