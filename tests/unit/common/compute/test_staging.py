"""Buffers between host and device: kept, grown, and not touched while a copy is under way."""

from __future__ import annotations

import pytest
import torch

from common.compute.device import (
    ALIGNMENT_BYTES,
    HANG_S,
    LOOK_S,
    MIN_BYTES,
    Marker,
    StagingBuffer,
    lay_out,
    view_at,
)
from common.errors import DeviceError, RankLostError


class SlowMarker(Marker):
    """Reached when it has been looked at so often."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.left = 0

    def record(self) -> None:
        self.left = self.looks

    def is_reached(self) -> bool:
        self.left -= 1
        return self.left < 0


def memory_of(buffer: StagingBuffer) -> torch.Tensor:
    assert buffer._memory is not None
    return buffer._memory


def test_memory_is_kept_and_grown_to_the_largest_message() -> None:
    buffer = StagingBuffer(Marker(), is_pinned=False)
    assert buffer._memory is None
    address = buffer.take(100).data_ptr()
    assert memory_of(buffer).numel() == MIN_BYTES
    assert buffer.take(MIN_BYTES).data_ptr() == address
    assert buffer.take(3 * MIN_BYTES).numel() == 3 * MIN_BYTES
    assert memory_of(buffer).numel() == 4 * MIN_BYTES, (
        "a power of two: it is not grown by every message that is a little longer"
    )
    assert buffer.take(0).numel() == 0


def test_memory_that_was_made_in_inference_mode_can_be_filled_outside_of_it() -> None:
    buffer = StagingBuffer(Marker(), is_pinned=False)
    with torch.inference_mode():
        buffer.take(8).fill_(1)
    assert buffer.take(8).fill_(2).tolist() == [2] * 8


def test_nobody_gets_it_before_the_copy_under_way_is_done() -> None:
    marker, pauses = SlowMarker(5), []
    buffer = StagingBuffer(marker, is_pinned=False, pause=lambda: pauses.append(marker.left))
    buffer.take(8)
    assert pauses == []
    buffer.mark()
    buffer.take(8)
    assert pauses
    assert marker.left < 0


def test_a_device_that_hangs_ends_the_wait_and_is_named() -> None:
    now_s = 0.0

    def pause() -> None:
        nonlocal now_s
        now_s += HANG_S / 4

    buffer = StagingBuffer(SlowMarker(1000), is_pinned=False, clock=lambda: now_s, pause=pause)
    buffer.mark()
    with pytest.raises(DeviceError, match="the GPU hangs: a copy has not finished for 30 s"):
        buffer.wait()
    assert now_s < 2 * HANG_S


def test_what_waits_looks_around_now_and_then_and_what_it_finds_ends_the_wait() -> None:
    now_s, looks = 0.0, []

    def pause() -> None:
        nonlocal now_s
        now_s += LOOK_S

    def look(waited_s: float) -> None:
        looks.append(waited_s)
        if len(looks) == 3:
            raise RankLostError("gone")

    buffer = StagingBuffer(SlowMarker(1000), is_pinned=False, clock=lambda: now_s, pause=pause, look=look)
    buffer.mark()
    with pytest.raises(RankLostError):
        buffer.wait()
    assert looks == sorted(looks)
    assert looks[0] >= LOOK_S


def test_whether_it_is_done_is_asked_without_waiting_until_the_device_hangs() -> None:
    now_s = 0.0
    buffer = StagingBuffer(SlowMarker(2), is_pinned=False, clock=lambda: now_s)
    buffer.mark()
    assert [buffer.is_done() for _ in range(3)] == [False, False, True]
    buffer = StagingBuffer(SlowMarker(1000), is_pinned=False, clock=lambda: now_s)
    buffer.mark()
    assert not buffer.is_done()
    now_s = HANG_S + 1
    with pytest.raises(DeviceError, match="the GPU hangs"):
        buffer.is_done()


def test_tensors_lie_apart_so_that_each_begins_as_a_device_wants_it() -> None:
    tensors = [torch.ones(3, dtype=torch.int64), torch.ones(0, 4), torch.ones(300, 2, dtype=torch.bfloat16)]
    offsets, num_bytes = lay_out(tensors)
    assert offsets == [0, ALIGNMENT_BYTES, ALIGNMENT_BYTES]
    assert num_bytes == 4 * ALIGNMENT_BYTES
    memory = torch.zeros(num_bytes, dtype=torch.uint8)
    for tensor, offset in zip(tensors, offsets, strict=True):
        view_at(memory, offset, tensor).copy_(tensor)
    for tensor, offset in zip(tensors, offsets, strict=True):
        assert torch.equal(view_at(memory, offset, tensor), tensor)
