"""Ranks that are lost where nobody needs them, or while the stage grows: it goes on as it is, with nothing extra."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import CheckpointError, RankLostError
from common.messages import AssignMirror, AssignStage, Header
from services.stage.ranks import group as group_module
from services.stage.ranks import worker as worker_module
from services.stage.ranks.kv_memory import RankKv
from services.stage.ranks.worker import RankWorker
from services.stage.slot.slot import RoleTaken
from services.stage.slot.stage_worker import StageWorker
from tests.support.checkpoints.tiny_checkpoints import QWEN3, write_checkpoint
from tests.support.nodes.rank_threads import NUM_POSITIONS, rank_threads
from tests.support.processes.waiting import wait_until
from tests.unit.stage.ranks.test_growth import keeper_of, step, take_slot

IDS = torch.arange(50, dtype=torch.int64) + 5


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, QWEN3)


def watch_parts(monkeypatch: pytest.MonkeyPatch, fails: Any = lambda rank: None) -> list[weakref.ref[Any]]:
    """Parts that other ranks have loaded. `fails(rank)` may raise."""
    parts: list[weakref.ref[Any]] = []
    load_stage: Any = vars(worker_module)["load_stage"]

    def load(*arguments: Any) -> Any:
        fails(arguments[-1].shard.rank)
        model = load_stage(*arguments)
        parts.append(weakref.ref(model.layers[0].half.attention.parts[0].qkv))
        return model

    monkeypatch.setattr(worker_module, "load_stage", load)
    return parts


def num_alive(parts: list[weakref.ref[Any]]) -> int:
    gc.collect()
    return sum(part() is not None for part in parts)


def grow_until(keeper: StageWorker, what: str, holds: Any) -> None:
    def look() -> bool:
        keeper.poll()
        keeper.grow()
        return bool(holds())

    wait_until(look, 10, what, interval_s=0.001)


def test_a_rank_that_is_lost_while_it_loads_for_growth_takes_nothing_from_those_that_work(checkpoint: Path) -> None:
    with rank_threads(checkpoint, 2) as ranks:
        ranks.lose(1)
        ranks.group.reform()
        with keeper_of(ranks) as keeper:
            slot = take_slot(keeper)
            expected = step(slot, IDS, 0)
            ranks.start(1)
            keeper.grow()
            assert keeper._growing is not None
            ranks.lose(1)
            grow_until(keeper, "the end of the growth", lambda: keeper._growing is None)
            assert (keeper.slot, ranks.group.degree) == (slot, 1)
            assert torch.equal(step(slot, IDS, 0), expected)
            assert not ranks.group.may_grow(), "it looks again later"


def test_a_rank_that_is_there_without_work_may_be_lost(checkpoint: Path) -> None:
    with rank_threads(checkpoint, 4) as ranks:
        ranks.lose(2)
        ranks.group.reform()
        with keeper_of(ranks) as keeper:
            slot = take_slot(keeper)
            assert ranks.group.degree == 2, "of three"
            expected = step(slot, IDS, 0)
            ranks.lose(3)
            keeper.poll()
            assert torch.equal(step(slot, IDS, 0), expected)
            ranks.lose(1)
            with pytest.raises(RankLostError):
                keeper.poll()


def test_a_growth_that_fails_again_and_again_leaves_no_part_behind(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_bad = False

    def fails(rank: int) -> None:
        if is_bad and rank == 3:
            raise CheckpointError("rank 3 cannot read")

    parts = watch_parts(monkeypatch, fails)
    monkeypatch.setattr(group_module, "GROW_AGAIN_S", 0.0)
    with rank_threads(checkpoint, 4) as ranks:
        ranks.lose(2)
        ranks.group.reform()
        with keeper_of(ranks) as keeper:
            take_slot(keeper)
            assert num_alive(parts) == 1
            ranks.start(2)
            is_bad = True
            for _ in range(3):
                grow_until(keeper, "an attempt", lambda: keeper._growing is not None)
                grow_until(keeper, "its end", lambda: keeper._growing is None)
            assert ranks.group.degree == 2
            # Ranks give up what they have loaded once they are told, which is soon.
            monkeypatch.setattr(group_module, "GROW_AGAIN_S", 60.0)
            ranks.group.postpone_growth("enough")
            wait_until(lambda: num_alive(parts) == 1, 10, "that only the part in use is left")


def test_ranks_make_room_for_another_slot_before_they_load_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_at_load: list[int] = []
    parts: list[weakref.ref[Any]] = watch_parts(monkeypatch, lambda rank: held_at_load.append(num_alive(parts)))
    with rank_threads(checkpoint, 2) as ranks, keeper_of(ranks) as keeper:
        take_slot(keeper)
        other = AssignStage(0, 0, 2, 0, 2, 1, 3, ("tcp://router:1",), "")
        assert keeper.assign(other, Header(generation=2), torch.float32) is None
        wait_until(lambda: keeper.poll() is not None, 10, "the other slot", interval_s=0.001)
    assert held_at_load == [0, 0]


def test_a_disk_error_on_a_rank_is_said_and_does_not_end_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(rank: int) -> None:
        raise OSError(5, "Input/output error")

    watch_parts(monkeypatch, fails)
    with rank_threads(checkpoint, 2) as ranks, keeper_of(ranks) as keeper:
        assignment = AssignStage(0, 0, 1, 0, 5, 1, 3, ("tcp://router:1",), "")
        assert keeper.assign(assignment, Header(generation=1), torch.float32) is None
        answers: list[Any] = []

        def answered() -> bool:
            answers.append(keeper.poll())
            return answers[-1] is not None

        wait_until(answered, 10, "a refusal", interval_s=0.001)
        assert "rank 1: [Errno 5] Input/output error" in str(answers[-1].error)


def test_memory_that_is_given_up_at_once_was_mapped_by_all_before(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_memory: Any = RankKv.open

    def late(self: RankKv, command: Any) -> None:
        time.sleep(0.05)
        open_memory(self, command)

    monkeypatch.setattr(RankKv, "open", late)
    with rank_threads(checkpoint, 2) as ranks, keeper_of(ranks) as keeper:
        take_slot(keeper)
        ranks.allocate(torch.float32)
        ranks.group.forget_memory()
        time.sleep(0.1)  # what goes wrong on a rank fails the test


def test_a_rank_that_joins_with_an_epoch_that_is_over_is_used_only_once_it_has_seen_the_next(checkpoint: Path) -> None:
    with rank_threads(checkpoint, 2) as ranks:
        ranks.lose(1)
        ranks.group.reform()
        with keeper_of(ranks) as keeper:
            late = RankWorker(ranks.channel(), 1, checkpoint, NUM_POSITIONS, "board", ranks.kernels, ranks.log)
            ranks.group.in_use = None
            ranks.group.reform()
            take_slot(keeper)
            ranks.supervisor.starts[1] = 4242
            late.join(4242)
            ranks.supervisor.gone.discard(1)
            keeper.grow()
            assert keeper._growing is None
            stopping = threading.Event()
            thread = threading.Thread(target=late.run, args=(stopping.is_set,), daemon=True)
            thread.start()
            grow_until(keeper, "the full degree", lambda: ranks.group.degree == 2)
            stopping.set()
            thread.join()


def test_no_step_begins_once_the_stage_can_grow_so_that_it_does(checkpoint: Path) -> None:
    with rank_threads(checkpoint, 2) as ranks:
        ranks.lose(1)
        ranks.group.reform()
        with keeper_of(ranks) as keeper:
            slot = take_slot(keeper)
            ranks.start(1)
            executor: Any = slot.executor
            executor._running = {"a step": "that waits for experts"}
            assert executor.num_running == 1
            assert not keeper.waits_for_quiet
            grow_until(keeper, "that all is loaded", lambda: keeper.waits_for_quiet)
            keeper.grow()
            assert ranks.group.degree == 1
            executor._running = {}
            keeper.grow()
            assert (ranks.group.degree, keeper.waits_for_quiet) == (2, False)


@pytest.mark.parametrize("by", ["the end of the slot", "the end of the incarnation", "a mirror's role"])
def test_what_was_loaded_for_a_growth_that_does_not_come_is_given_up(checkpoint: Path, by: str) -> None:
    with rank_threads(checkpoint, 2) as ranks:
        ranks.lose(1)
        ranks.group.reform()
        with keeper_of(ranks) as keeper:
            executor: Any = take_slot(keeper).executor
            ranks.start(1)
            executor._running = {"a step": "that waits for experts"}
            grow_until(keeper, "that all is loaded", lambda: keeper.waits_for_quiet)
            assert ranks.workers[1]._loads
            if by == "the end of the slot":
                keeper.forget()
            elif by == "the end of the incarnation":
                ranks.group.reform()
                assert ranks.group.in_use is not None, "all are there"
            else:
                follow = AssignMirror(0, 0, 1, 0, 5, 1, 3, ("tcp://holder:1",), "")
                assert isinstance(keeper.assign(follow, Header(generation=2), torch.float32), RoleTaken)
                assert not keeper.waits_for_quiet, "or nothing of the copy is received"
            wait_until(lambda: not ranks.workers[1]._loads, 10, "that the ranks have heard of it")
