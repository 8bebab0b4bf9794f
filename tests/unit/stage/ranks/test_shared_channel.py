"""The channel: words that are waited for, and memory that several views have in common."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from services.stage.ranks.shared_channel import EpochOver, SharedChannel, SharedMemory
from tests.support.nodes.kernels import kernels_for

SLAB_BYTES = 256


@pytest.fixture
def channels() -> tuple[SharedChannel, SharedChannel]:
    """Two views of one channel."""
    kernels = kernels_for("native")
    assert kernels is not None
    memory = SharedMemory.create(SharedChannel.num_bytes(SLAB_BYTES), "test-channel")
    other = SharedMemory.open(os.getpid(), memory.descriptor, memory.num_bytes)
    return SharedChannel(memory, SLAB_BYTES, kernels), SharedChannel(other, SLAB_BYTES, kernels)


def test_what_was_written_before_a_word_is_there_when_it_is_seen(channels: tuple[SharedChannel, SharedChannel]) -> None:
    one, other = channels
    seen: list[int] = []

    def follow() -> None:
        for turn in range(1, 2000):
            assert other.wait("turn", 0, turn, 0, 10)
            seen.append(other.read()[0][0])
            other.set("taken", 3, turn)

    thread = threading.Thread(target=follow)
    thread.start()
    for turn in range(1, 2000):
        one.write([turn * 3], torch.empty(0, dtype=torch.uint8), 0, 0)
        one.set("turn", 0, turn)
        assert one.wait("taken", 3, turn, 0, 10)
    thread.join()
    assert seen == [turn * 3 for turn in range(1, 2000)]


def test_a_wait_ends_when_its_time_is_up(channels: tuple[SharedChannel, SharedChannel]) -> None:
    began_s = time.monotonic()
    assert not channels[0].wait("arrived", 1, 5, 0, 0.05)
    assert 0.05 <= time.monotonic() - began_s < 1


def test_a_new_epoch_ends_a_wait_that_sleeps(channels: tuple[SharedChannel, SharedChannel]) -> None:
    one, other = channels
    threading.Timer(0.1, lambda: other.set("epoch", 0, 1)).start()
    with pytest.raises(EpochOver):
        one.wait("arrived", 1, 5, 0, 10)


def test_a_sentence_is_cut_to_its_place(channels: tuple[SharedChannel, SharedChannel]) -> None:
    one, other = channels
    other.say(2, "tensor é is missing" + "!" * 5000)
    other.say(3, "another")
    assert one.said(2).startswith("tensor é is missing!!!")
    assert one.said(3) == "another"


def test_tensors_that_do_not_fit_are_refused_with_the_numbers() -> None:
    memory = SharedMemory.create(128, "test")
    memory.next_tensor((8,), torch.float32)
    with pytest.raises(ValueError, match=r"\[40\] of torch.float32 do not fit: 128 bytes of which 64 are taken"):
        memory.next_tensor((40,), torch.float32)
