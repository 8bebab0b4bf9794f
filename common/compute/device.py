"""Where a node computes: in the host's memory, or on a device with memory of its own.

Messages, samples and sums over experts are on the host. A node with a device puts the tensors of a batch there, and
takes back what goes out. On the host both are nothing. All work is in one order, the device's current stream: what is
asked later sees what was asked before. Only what comes back goes beside it, on a stream of copies: while it is on its
way the device computes what was asked meanwhile, and the host asks, and sends.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common.errors import DeviceError
from common.processes.memory import offered_bytes

ALIGNMENT_BYTES = 512
"""The same as that of the device's own allocations: which algorithm a library takes may depend on it."""
MIN_BYTES = 1 << 16
LOOK_S = 0.02
HANG_S = 30.0
"""A device that has not finished for this long hangs. Its process exits, and another one takes over the work."""


class Marker:
    """A point in the order of a device's work; this one is of what computes while it is called."""

    def record(self) -> None:
        """Here: after all that was asked of the device so far."""

    def is_reached(self) -> bool:
        """Returns whether all before it is done. Also before the first `record`."""
        return True


class StagingBuffer:
    """Host memory that a device copies from and to, and the marker behind the last such copy.

    Pinned memory is what a device can copy by itself while the host goes on. Allocating it takes long, so that messages
    share a few buffers, which grow to the largest message so far; what is in one may be overwritten only when the
    device has reached the marker.
    """

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

    def take(self, num_bytes: int) -> Tensor:
        """Returns uint8 [num_bytes] to be filled; what was in it is gone. Waits as `wait` does."""
        self.wait()
        if self._memory is None or self._memory.numel() < num_bytes:
            size = max(MIN_BYTES, 1 << (num_bytes - 1).bit_length())
            with torch.inference_mode(False):  # it is written to in both modes
                self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned)
        return self._memory[:num_bytes]

    def mark(self) -> None:
        """Notes that a copy from or to it is under way."""
        self._marker.record()
        self._marked_s = self._clock()

    def is_done(self) -> bool:
        """Returns whether that copy is. Raises DeviceError after HANG_S, and whatever the device reports."""
        if self._marker.is_reached():
            return True
        if self._clock() - self._marked_s > HANG_S:
            raise DeviceError(f"the GPU hangs: a copy has not finished for {HANG_S:.0f} s; this process exits")
        return False

    def wait(self) -> None:
        """Waits until that copy is done. Raises as `is_done` does."""
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
    """Returns where each tensor begins when they lie one after another, and how many bytes that takes."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += math.ceil(tensor.nbytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, end


def view_at(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """Returns the part of `memory` uint8 [bytes] at an offset as a tensor of `like`'s shape and dtype."""
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


HOST_MEMORY = torch.device("cpu")
NUM_UPLOADS = 4
"""Buffers that take turns, so that the host fills one while the device reads another."""


class Download:
    """Tensors on their way from a device to the host; these are there."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors

    def is_ready(self) -> bool:
        """Returns whether they are there. Raises DeviceError for a device that hangs, RuntimeError for what failed
        before."""
        return True

    def take(self) -> tuple[Tensor, ...]:
        """Returns them, as new ones of the host; waits until they are there. Once."""
        return self._tensors

    def give_up(self) -> None:
        """Gives them up: they will not be taken. It may be called after `take`, too."""


class Device:
    """What nodes need to know of the place where they compute. This one is the processor: tensors are there already."""

    place = HOST_MEMORY
    """The torch device of weights, caches and whatever is computed from them."""
    is_host = True
    """Whether messages and weights are in the same memory."""

    def __init__(self, num_processes: int = 1) -> None:
        """`num_processes` share the host's memory, where it has not been shared out."""
        self._num_processes = num_processes
        self.while_waiting: Callable[[float], None] = lambda waited_s: None
        """Called again and again, with the seconds so far, while the host waits for the device; it may raise."""

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns host tensors as they are on the device. The host goes on at once, and may reuse the given ones."""
        return tensors

    def to_host(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns device tensors as new ones of the host, whole when this returns: the one place where the host waits.

        Raises DeviceError for a device that hangs, RuntimeError for what failed before.
        """
        return self.begin_download(*tensors).take()

    def begin_download(self, *tensors: Tensor) -> Download:
        """Does the same without waiting. With no tensors, it is ready when the device has done all that was asked so
        far. Until they are taken nothing may write to them."""
        return Download(tensors)

    def release(self) -> None:
        """What was given up here is free for other processes that use the device."""

    def offered_bytes(self) -> int:
        """Returns how much memory a node may offer: 80% of what is free, or a part of that."""
        return offered_bytes() // self._num_processes

    def numeric_class(self, variant: str) -> str:
        """Returns what decides the bits of a result here, as one short word that peers compare: what computes
        (`variant`: kernels or torch), torch's instruction set and build. Threads change no bits; the dtype is the whole
        mesh's."""
        return numeric_word("cpu", variant, str(torch.backends.cpu.get_cpu_capability()), torch.__version__)


def numeric_word(*parts: str) -> str:
    """Returns a numeric class of these parts, the kind of device first."""
    return "/".join(parts).replace(" ", "-")


HOST = Device()


class StagedDownload(Download):
    """By a staging buffer, which goes back when it is taken or given up."""

    def __init__(
        self,
        buffer: StagingBuffer,
        sources: tuple[Tensor, ...],
        views: list[Tensor],
        give_back: Callable[[StagingBuffer], None],
    ) -> None:
        """`sources` are kept: the device would use their memory for what it computes next."""
        super().__init__(sources)
        self._buffer = buffer
        self._views = views
        self._give_back = give_back
        self._is_over = False

    def is_ready(self) -> bool:
        return self._buffer.is_done()

    def take(self) -> tuple[Tensor, ...]:
        """Copies of what is in the buffer: messages may hold them for long."""
        self._buffer.wait()
        taken = tuple(view.clone() for view in self._views)
        self.give_up()
        return taken

    def give_up(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._tensors, self._views = (), []
            self._give_back(self._buffer)


class StagedDevice(Device):
    """Memory that is reached through staging buffers. Used by one thread; weights are loaded by another, without them.

    With `torch.device("cpu")` it does the same copies from plain memory to plain memory: tests run it so.
    """

    is_host = False

    def __init__(
        self,
        place: torch.device,
        new_marker: Callable[[], Marker] = Marker,
        *,
        is_pinned: bool = False,
        num_processes: int = 1,
    ) -> None:
        super().__init__(num_processes)
        self.place = place

        def new_buffer() -> StagingBuffer:
            return StagingBuffer(new_marker(), is_pinned=is_pinned, look=lambda waited_s: self.while_waiting(waited_s))

        self._uploads = [new_buffer() for _ in range(NUM_UPLOADS)]
        self._num_uploads = 0
        self._new_buffer = new_buffer
        self._downloads: list[StagingBuffer] = []
        """Those that nothing is taken from any more; what was copied to one may still be under way."""

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Makes one copy for all of them: a device begins a large copy no later than a small one."""
        offsets, num_bytes = lay_out(tensors)
        staging = self._uploads[self._num_uploads % NUM_UPLOADS]
        self._num_uploads += 1
        memory = staging.take(num_bytes)
        for tensor, offset in zip(tensors, offsets, strict=True):
            view_at(memory, offset, tensor).copy_(tensor)
        there = torch.empty(num_bytes, dtype=torch.uint8, device=self.place)
        there.copy_(memory, non_blocking=True)
        staging.mark()
        return tuple(view_at(there, offset, tensor) for tensor, offset in zip(tensors, offsets, strict=True))

    def begin_download(self, *tensors: Tensor) -> Download:
        """Copies into a buffer of its own, beside what the device computes next."""
        offsets, num_bytes = lay_out(tensors)
        buffer = self._downloads.pop() if self._downloads else self._new_buffer()
        memory = buffer.take(num_bytes)
        views = [view_at(memory, offset, tensor) for tensor, offset in zip(tensors, offsets, strict=True)]
        with self.beside_computing():
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor, non_blocking=True)
            buffer.mark()
        return StagedDownload(buffer, tensors, views, self._downloads.append)

    @contextlib.contextmanager
    def beside_computing(self) -> Iterator[None]:
        """What is asked of the device in the body comes after all before it, and what comes after does not wait for it.
        Here there is one order."""
        yield
