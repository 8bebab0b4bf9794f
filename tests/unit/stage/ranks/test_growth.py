"""A slot whose ranks are lost and come back: the stage grows between two steps, and K and V stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import RankLostError
from common.messages import AssignStage, Header
from services.stage.slot.layers import StageLayers
from services.stage.slot.slot import RoleRefused, RoleTaken, Slot
from services.stage.slot.stage_worker import StageWorker
from tests.support.checkpoints.tiny_checkpoints import QWEN3, write_checkpoint
from tests.support.nodes.memory_transport import MemoryTransport
from tests.support.nodes.rank_threads import NUM_POSITIONS, ThreadRanks, batch_of, finish, rank_threads
from tests.support.processes.waiting import wait_until

BLOCKS = [2, 0, 1]
PLENTY = 1 << 40


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[ThreadRanks]:
    with rank_threads(write_checkpoint(tmp_path, QWEN3), 2) as made:
        yield made


@contextmanager
def keeper_of(ranks: ThreadRanks, free_bytes: int = PLENTY) -> Iterator[StageWorker]:
    transport: Any = MemoryTransport()
    log: Any = ranks.log
    layers = StageLayers(ranks.config, ranks.checkpoint, NUM_POSITIONS, ranks.kernels, ranks=ranks.group)
    keeper = StageWorker(layers, transport, "", log, free_bytes=lambda: free_bytes)
    yield keeper
    keeper.close()


def take_slot(keeper: StageWorker) -> Slot:
    """All layers, in one slot."""
    assignment = AssignStage(0, 0, 1, 0, 5, 1, 3, ("tcp://router:1",), "")
    assert keeper.assign(assignment, Header(generation=1), torch.float32) is None
    answers: list[RoleTaken | RoleRefused] = []

    def answered() -> bool:
        answer = keeper.poll()
        if answer is not None:
            answers.append(answer)
        return bool(answers)

    wait_until(answered, 30, "the layers", interval_s=0.001)
    assert isinstance(answers[0], RoleTaken), answers[0]
    assert keeper.slot is not None
    return keeper.slot


def step(slot: Slot, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of a step of the slot."""
    return finish(slot.executor._forward(batch_of(ids, start, BLOCKS)))


def test_a_lost_rank_is_noticed_without_any_work(ranks: ThreadRanks) -> None:
    with keeper_of(ranks) as keeper:
        take_slot(keeper)
        assert ranks.group.degree == 2
        ranks.lose(1)
        with pytest.raises(RankLostError):
            keeper.poll()


def test_a_stage_that_grows_keeps_what_it_has_computed(ranks: ThreadRanks) -> None:
    ids = torch.arange(50, dtype=torch.int64) + 5
    ranks.lose(1)
    ranks.group.reform()
    with keeper_of(ranks) as keeper:
        slot = take_slot(keeper)
        assert ranks.group.degree == 1
        step(slot, ids[:49], 0)
        expected = step(slot, ids[49:], 49)
        keeper.grow()
        assert ranks.group.degree == 1, "nobody else is there"
        ranks.start(1)

        def grown() -> bool:
            keeper.grow()
            return ranks.group.degree == 2

        wait_until(grown, 30, "the full degree", interval_s=0.001)
        assert keeper.slot is slot
        assert torch.equal(step(slot, ids[49:], 49), expected)
        assert ranks.group.exchange.count > 0


def test_without_memory_for_both_parts_it_stays_as_it_is_and_says_so(ranks: ThreadRanks) -> None:
    ranks.lose(1)
    ranks.group.reform()
    with keeper_of(ranks, free_bytes=1000) as keeper:
        take_slot(keeper)
        ranks.start(1)
        assert ranks.group.may_grow()
        keeper.grow()
        assert not ranks.group.may_grow(), "it looks again later"
        assert any(call.kwargs["event"] == "rank_growth_postponed" for call in ranks.log._logger.calls)
