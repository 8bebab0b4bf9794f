"""The board: words that are waited for, and memory that several views have in common."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from services.stage.ranks.commands import LoadOrder, decode_load, encode_load, write_command
from services.stage.ranks.shared_channel import EpochOver, RankBoard
from services.stage.ranks.shared_memory import SharedMemory
from tests.support.nodes.kernels import kernels_for

SLAB_BYTES = 256


@pytest.fixture
def boards() -> tuple[RankBoard, RankBoard]:
    """Two views of one board."""
    kernels = kernels_for("native")
    assert kernels is not None
    memory = SharedMemory.create(RankBoard.num_bytes(SLAB_BYTES), "test-board")
    other = SharedMemory.open(os.getpid(), memory.descriptor, memory.num_bytes)
    return RankBoard(memory, SLAB_BYTES, kernels), RankBoard(other, SLAB_BYTES, kernels)


def test_what_was_written_before_a_word_is_there_when_it_is_seen(boards: tuple[RankBoard, RankBoard]) -> None:
    one, other = boards
    seen: list[int] = []

    def follow() -> None:
        for turn in range(1, 2000):
            assert other.wait("turn", 0, turn, 0, 10)
            seen.append(int(other.command[0]))
            other.set("taken", 3, turn)

    thread = threading.Thread(target=follow)
    thread.start()
    for turn in range(1, 2000):
        write_command(one.command, [turn * 3])
        one.set("turn", 0, turn)
        assert one.wait("taken", 3, turn, 0, 10)
    thread.join()
    assert seen == [turn * 3 for turn in range(1, 2000)]


def test_a_wait_ends_when_its_time_is_up(boards: tuple[RankBoard, RankBoard]) -> None:
    began_s = time.monotonic()
    assert not boards[0].wait("arrived", 1, 5, 0, 0.05)
    assert 0.05 <= time.monotonic() - began_s < 1


def test_a_new_epoch_ends_a_wait_that_sleeps(boards: tuple[RankBoard, RankBoard]) -> None:
    one, other = boards
    threading.Timer(0.1, lambda: other.set("epoch", 0, 1)).start()
    with pytest.raises(EpochOver):
        one.wait("arrived", 1, 5, 0, 10)


def test_a_sentence_is_cut_to_its_place(boards: tuple[RankBoard, RankBoard]) -> None:
    one, other = boards
    other.say(2, "tensor é is missing" + "!" * 5000)
    other.say(3, "another")
    assert one.said(2).startswith("tensor é is missing!!!")
    assert one.said(3) == "another"


def test_tensors_that_do_not_fit_are_refused_with_the_numbers() -> None:
    memory = SharedMemory.create(128, "test")
    memory.take((8,), torch.float32)
    with pytest.raises(ValueError, match=r"\[40\] of torch.float32 do not fit: 128 bytes of which 64 are taken"):
        memory.take((40,), torch.float32)


def test_a_load_order_comes_back_with_each_seats_rank() -> None:
    order = LoadOrder(7, 2, 3, 5, 0, 1, 1, 0, 4, 1)
    board = torch.zeros(32, dtype=torch.int64).numpy()
    write_command(board, encode_load(order, [0, -1, 1]))
    assert decode_load(board, 0) == (order, 0, (0, 2))
    assert decode_load(board, 1)[1] == -1
    assert decode_load(board, 2)[1] == 1
