"""Memory that all ranks of a stage map: rank 0 makes it, the others open it by its descriptor. No file, no name."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 64


class SharedMemory:
    """Zeroed bytes, out of which tensors are taken one after another. Tensors keep the mapping alive."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Takes the descriptor over."""
        self.descriptor = descriptor
        self.num_bytes = num_bytes
        self._map = mmap.mmap(descriptor, num_bytes)
        self._taken = 0

    @classmethod
    def create(cls, num_bytes: int, name: str) -> SharedMemory:
        """`name` is for /proc/PID/maps. Raises OSError where there is not so much memory."""
        descriptor = os.memfd_create(name)
        try:
            os.ftruncate(descriptor, num_bytes)
            return cls(descriptor, num_bytes)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, process: int, descriptor: int, num_bytes: int) -> SharedMemory:
        """What another process of the same user has made. Raises OSError if that one is gone."""
        return cls(os.open(Path("/proc") / str(process) / "fd" / str(descriptor), os.O_RDWR), num_bytes)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor; whoever takes the same shapes in the same order gets the same memory."""
        size = prod(shape)
        start = self._taken
        self._taken += -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if self._taken > self.num_bytes:
            raise ValueError(f"{list(shape)} of {dtype} do not fit: {self.num_bytes} bytes of which {start} are taken")
        if not size:
            return torch.zeros(tuple(shape), dtype=dtype)
        with torch.inference_mode(False):  # it is written to in both modes
            return torch.frombuffer(self._map, dtype=dtype, count=size, offset=start).view(tuple(shape))

    def close(self) -> None:
        """Let the descriptor go. The bytes go with the last tensor and the last process that has them."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def aligned_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """What `take` uses up for such a tensor."""
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
