"""Host memory that a device copies from and to: kept, and grown to the largest message so far.

Pinned memory is what a device can copy by itself while the host goes on. Allocating it takes long, so that messages
share a few buffers; what is in one may be overwritten only when the device has reached the marker behind its copy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from common.errors import DeviceError

ALIGNMENT_BYTES = 512
"""As the device's own allocations: which algorithm a library takes may depend on it."""
MIN_BYTES = 1 << 16
LOOK_S = 0.02
HANG_S = 30.0
"""A device that has not finished for so long hangs. Its process ends, and another one takes the work."""


class Marker(Protocol):
    """A point in the order of a device's work."""

    def record(self) -> None:
        """Here: after all that was asked of the device so far."""

    def is_reached(self) -> bool:
        """Whether all before it is done. Also before the first `record`."""


class NoMarker:
    """Of what computes while it is called."""

    def record(self) -> None:
        """Nothing is under way."""

    def is_reached(self) -> bool:
        """Always."""
        return True


class StagingBuffer:
    """One buffer, and the marker behind the last copy from or to it."""

    def __init__(
        self,
        marker: Marker,
        *,
        is_pinned: bool,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[], None] = lambda: time.sleep(0),
        look: Callable[[float], None] = lambda waited_s: None,
    ) -> None:
        """`pause` is called between two looks at the marker, and every LOOK_S `look`, which may raise."""
        self._marker = marker
        self._is_pinned = is_pinned
        self._clock = clock
        self._pause = pause
        self._look = look
        self._marked_s = 0.0
        self._memory: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """That it has now."""
        return 0 if self._memory is None else self._memory.numel()

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] to be filled; what was in it is gone. Waits as `wait` does."""
        self.wait()
        if self._memory is None or self._memory.numel() < num_bytes:
            size = max(MIN_BYTES, 1 << (num_bytes - 1).bit_length())
            with torch.inference_mode(False):  # it is written to in both modes
                self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned)
        return self._memory[:num_bytes]

    def mark(self) -> None:
        """A copy from or to it is under way."""
        self._marker.record()
        self._marked_s = self._clock()

    def is_done(self) -> bool:
        """Whether that copy is. Raises DeviceError after HANG_S, and whatever the device reports."""
        if self._marker.is_reached():
            return True
        if self._clock() - self._marked_s > HANG_S:
            raise DeviceError(f"the GPU hangs: a copy has not ended for {HANG_S:.0f} s, and this process does")
        return False

    def wait(self) -> None:
        """Until that copy is done. Raises as `is_done` does."""
        if self.is_done():
            return
        began_s = looked_s = self._clock()
        while not self.is_done():
            now_s = self._clock()
            if now_s - looked_s >= LOOK_S:
                looked_s = now_s
                self._look(now_s - began_s)
            self._pause()


def lay_out(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins when they lie one after another, and how many bytes that takes."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += math.ceil(tensor.nbytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, end


def view_at(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """The part of `memory` uint8 [bytes] at an offset as a tensor of `like`'s shape and dtype."""
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
