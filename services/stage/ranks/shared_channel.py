"""Memory that all ranks of a stage map: words to wait for, and slabs for tensors. Rank 0 makes it. No file, no name.

One writer a word. Numbers only grow, but for process ids, which are compared and never waited for:

    epoch                          rank 0: a new one makes all ranks drop what is under way
    turn                           rank 0: number of the newest message
    taken[s] arrived[s] loaded[s]  seat s: messages read, barriers reached, newest load that is done
    present[s]                     seat s: process id once it has mapped the channel; 0 before
    attached[s]                    rank 0: process id of the reader there, for which rank 0 waits
    failed[s]                      seat s: number of a load that failed; its sentence is in the text area
    refused[s]                     seat s: number of an allocation that it has no room for; likewise
    settled[s]                     seat s: the newest epoch that it has seen

A seat is a place in the channel, for as long as the stage lives; seat 0 is rank 0. Which rank another seat has, and
whether any, each load says anew.

The ordering of memory comes from the words: what was written before a word was set is seen by those that waited for it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.compute.native_library import NativeKernels
from common.errors import MoemeshError, error_from_wire
from services.stage.model.tp_shard import MAX_DEGREE

ALIGNMENT = 64
WORD_BYTES = 64
MESSAGE_VALUES = 64
TEXT_BYTES = 2048
SPIN_NS = 20_000
"""A part that is computed beside ours is mostly done by then; longer, and a shared core is taken from what computes."""
_OF_SEATS = ("taken", "arrived", "loaded", "present", "attached", "failed", "refused", "settled")
_ROWS = {"epoch": 0, "turn": 1} | {name: 2 + number * MAX_DEGREE for number, name in enumerate(_OF_SEATS)}
_NUM_WORDS = 2 + len(_OF_SEATS) * MAX_DEGREE


class EpochOver(Exception):
    """Rank 0 has begun another epoch: what was under way is dropped."""


class SharedMemory:
    """Zeroed bytes, out of which tensors are made one after another. Tensors keep the mapping alive."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """The descriptor is this object's from now on."""
        self.descriptor = descriptor
        self.num_bytes = num_bytes
        self._map = mmap.mmap(descriptor, num_bytes)
        self._used_bytes = 0

    @classmethod
    def create(cls, num_bytes: int, name: str) -> SharedMemory:
        """Makes this many bytes; `name` is for /proc/PID/maps. Raises OSError where there is too little memory."""
        descriptor = os.memfd_create(name)
        try:
            os.ftruncate(descriptor, num_bytes)
            return cls(descriptor, num_bytes)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, process: int, descriptor: int, num_bytes: int) -> SharedMemory:
        """Maps what another process of the same user has made. Raises OSError if that one is gone."""
        return cls(os.open(Path("/proc") / str(process) / "fd" / str(descriptor), os.O_RDWR), num_bytes)

    def next_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns the next tensor; asking for the same shapes in the same order gives the same memory."""
        size = prod(shape)
        start = self._used_bytes
        self._used_bytes += aligned_bytes(shape, dtype)
        if self._used_bytes > self.num_bytes:
            raise ValueError(f"{list(shape)} of {dtype} do not fit: {self.num_bytes} bytes of which {start} are taken")
        if not size:
            return torch.zeros(tuple(shape), dtype=dtype)
        with torch.inference_mode(False):  # it is written to in both modes
            return torch.frombuffer(self._map, dtype=dtype, count=size, offset=start).view(tuple(shape))

    def close(self) -> None:
        """Lets the descriptor go. The bytes go with the last tensor and the last process that has them."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def aligned_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Returns what `SharedMemory.next_tensor` uses up for such a tensor."""
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


class SharedChannel:
    """One process's view of it."""

    def __init__(self, memory: SharedMemory, slab_bytes: int, kernels: NativeKernels) -> None:
        self.memory = memory
        self.slab_bytes = slab_bytes
        self._kernels = kernels
        words = memory.next_tensor((_NUM_WORDS, WORD_BYTES // 8), torch.int64)
        self._words = words.numpy()
        self._address = words.data_ptr()
        self._message = memory.next_tensor((MESSAGE_VALUES,), torch.int64).numpy()
        self._texts = memory.next_tensor((MAX_DEGREE, TEXT_BYTES), torch.uint8).numpy()
        self._payload = memory.next_tensor((slab_bytes,), torch.uint8)
        self.slabs = tuple(memory.next_tensor((slab_bytes,), torch.uint8) for _ in range(2))
        """Slabs for parts that ranks put together, in turns."""

    def get(self, name: str, seat: int = 0) -> int:
        """Returns a word as it is now."""
        return int(self._words[_ROWS[name] + seat, 0])

    def set(self, name: str, seat: int, value: int) -> None:
        """Sets a word and wakes those that wait for it."""
        self._kernels.set_word(self._at(name, seat), value)

    def wait(self, name: str, seat: int, value: int, epoch: int, timeout_s: float) -> bool:
        """Waits until a seat's word is at least `value`; returns False when the time is up first. Raises EpochOver."""
        outcome = self._kernels.await_word(
            self._at(name, seat), value, self._at("epoch", 0), epoch, SPIN_NS, int(timeout_s * 1e9)
        )
        if outcome == -2:
            raise EpochOver
        return bool(outcome == -1)

    def write(self, values: Sequence[int], piece: Tensor, start: int, total: int) -> None:
        """Writes what rank 0 says with the next turn: numbers, and bytes [start, start + len(piece)) of `total` that go
        with them. All must have taken what was said before."""
        count = piece.shape[0]
        self._message[: 4 + len(values)] = (start, count, total, len(values), *values)
        self._payload[:count] = piece

    def read(self) -> tuple[list[int], Tensor, int, int]:
        """Returns what `write` was given. The bytes are those of the channel: they are gone once `taken` is set."""
        start, count, total, num_values, *values = self._message.tolist()
        return values[:num_values], self._payload[:count], start, total

    def say(self, seat: int, sentence: str) -> None:
        """Writes a sentence for rank 0 to read, with `failed` or `refused`."""
        data = sentence.encode(errors="replace")[:TEXT_BYTES]
        self._texts[seat] = 0
        self._texts[seat, : len(data)] = np.frombuffer(data, dtype=np.uint8)

    def refusal(self, seat: int, rank: int) -> MoemeshError:
        """Returns the error that a rank has said: its code, then its sentence."""
        code, _, sentence = self.said(seat).partition(" ")
        return error_from_wire(code, f"rank {rank}: {sentence}")

    def said(self, seat: int) -> str:
        """Returns what a seat had to say."""
        return bytes(self._texts[seat]).rstrip(b"\0").decode(errors="replace")

    @staticmethod
    def num_bytes(slab_bytes: int) -> int:
        """Returns the bytes of the whole channel."""
        return _NUM_WORDS * WORD_BYTES + MESSAGE_VALUES * 8 + MAX_DEGREE * TEXT_BYTES + 3 * (slab_bytes + ALIGNMENT)

    def _at(self, name: str, seat: int) -> int:
        return self._address + (_ROWS[name] + seat) * WORD_BYTES


def slab_view(slab: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns the beginning of a slab as a tensor."""
    return slab[: prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
