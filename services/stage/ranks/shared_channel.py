"""The board on which rank 0 writes commands and all ranks lay down their parts. One writer a word, numbers only grow.

    epoch                          rank 0: a new one makes everybody drop what is under way
    turn                           rank 0: number of the newest command
    taken[s] arrived[s] loaded[s]  seat s: commands read, phases reached, newest load that is done
    present[s]                     seat s: process id once it has mapped the board; 0 before
    failed[s]                      seat s: number of a load that failed; its sentence is in the text area
    refused[s]                     seat s: number of an allocation that it has no room for; likewise
    settled[s]                     seat s: the newest epoch that it has seen
    command                        int64 [COMMAND_VALUES]
    input, middle, output          one slab each for tensors

A seat is a place on the board, for as long as the stage lives; seat 0 is rank 0. Which rank another seat has, and
whether any, each load says anew.

The ordering of memory comes from the words: what was written before a word was set is seen by who waited for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.compute.native_library import NativeKernels
from common.errors import MoemeshError, error_from_wire
from services.stage.model.tp_shard import MAX_DEGREE
from services.stage.ranks.shared_memory import SharedMemory

WORD_BYTES = 64
COMMAND_VALUES = 32
TEXT_BYTES = 2048
SPIN_NS = 20_000
"""A part that is computed beside ours is mostly done by then; longer, and a shared core is taken from who computes."""
_ROWS = {"epoch": 0, "turn": 1, "taken": 2, "arrived": 2 + MAX_DEGREE, "loaded": 2 + 2 * MAX_DEGREE}
_ROWS |= {"present": 2 + 3 * MAX_DEGREE, "failed": 2 + 4 * MAX_DEGREE, "settled": 2 + 5 * MAX_DEGREE}
_ROWS |= {"refused": 2 + 6 * MAX_DEGREE}
_NUM_WORDS = 2 + 7 * MAX_DEGREE


class EpochOver(Exception):
    """Rank 0 has begun another epoch: what was under way is dropped."""


class RankBoard:
    """One process's view of it."""

    def __init__(self, memory: SharedMemory, slab_bytes: int, kernels: NativeKernels) -> None:
        self.memory = memory
        self.slab_bytes = slab_bytes
        self._kernels = kernels
        words = memory.take((_NUM_WORDS, WORD_BYTES // 8), torch.int64)
        self._words = words.numpy()
        self._address = words.data_ptr()
        self.command = memory.take((COMMAND_VALUES,), torch.int64).numpy()
        self._texts = memory.take((MAX_DEGREE, TEXT_BYTES), torch.uint8).numpy()
        self.input, self.middle, self.output = (memory.take((slab_bytes,), torch.uint8) for _ in range(3))

    def get(self, name: str, seat: int = 0) -> int:
        """A word as it is now."""
        return int(self._words[_ROWS[name] + seat, 0])

    def set(self, name: str, seat: int, value: int) -> None:
        """Set a word and wake who waits for it."""
        self._kernels.set_word(self._at(name, seat), value)

    def wait(self, name: str, seat: int, value: int, epoch: int, timeout_s: float) -> bool:
        """Until a seat's word is at least `value`; False when the time is up first. Raises EpochOver."""
        outcome = self._kernels.await_word(
            self._at(name, seat), value, self._at("epoch", 0), epoch, SPIN_NS, int(timeout_s * 1e9)
        )
        if outcome == -2:
            raise EpochOver
        return bool(outcome == -1)

    def say(self, seat: int, sentence: str) -> None:
        """For rank 0 to read, with `failed`."""
        data = sentence.encode(errors="replace")[:TEXT_BYTES]
        self._texts[seat] = 0
        self._texts[seat, : len(data)] = np.frombuffer(data, dtype=np.uint8)

    def refusal(self, seat: int, rank: int) -> MoemeshError:
        """The error that a rank has said: its code, then its sentence."""
        code, _, sentence = self.said(seat).partition(" ")
        return error_from_wire(code, f"rank {rank}: {sentence}")

    def said(self, seat: int) -> str:
        """What a seat had to say."""
        return bytes(self._texts[seat]).rstrip(b"\0").decode(errors="replace")

    @staticmethod
    def num_bytes(slab_bytes: int) -> int:
        """Of the whole board."""
        return _NUM_WORDS * WORD_BYTES + COMMAND_VALUES * 8 + MAX_DEGREE * TEXT_BYTES + 3 * (slab_bytes + WORD_BYTES)

    def _at(self, name: str, seat: int) -> int:
        return self._address + (_ROWS[name] + seat) * WORD_BYTES


def slab_view(slab: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The beginning of a slab as a tensor."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    return slab[:size].view(dtype).view(tuple(shape))
