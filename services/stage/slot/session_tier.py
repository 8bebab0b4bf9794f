"""Blocks that had to make room in the paged memory, in host memory of the stage: K, V and activation log of each.

The router says which block goes to which slot, and which comes back. What comes back is what went, byte for byte. Where
K and V are on the host a block is copied as it lies there; from devices it comes as `rows`, of all heads.

B blocks of one call, L layers of the stage, H KV heads, W head width, D model width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import ProtocolError
from common.messages import Step, TensorFrame
from common.wire.array import Int32Array, frame_to_array
from services.stage.model.kv_cache import PagedMemory, Rows, positions_of_blocks
from services.stage.model.paged_attention import KV_BLOCK_TOKENS

DEVICE_BLOCKS = 8
"""Blocks that go to a device or come from it at once: what they go through is host memory that is kept."""


class SessionTier(Protocol):
    """Slots of one paged memory. Blocks and slots are trusted: check them where they come in."""

    num_slots: int
    since: int
    """The step at which it was empty: it holds what steps behind that have saved."""

    def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        """Copies block by block to these slots [B]."""

    def restore(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        """Copies what was saved in these slots [B] to the blocks."""


def make_session_tier(memory: PagedMemory, num_slots: int, since: int) -> SessionTier:
    """Returns an empty tier. Its memory is taken as slots are used. Raises RuntimeError for want of address space."""
    kind = HostTier if memory.kv.whole is not None else DeviceTier
    return kind(memory, num_slots, since)


class HostTier:
    """A slot is one run of bytes: K and V of layer after layer as they lie in a block, and its part of the log."""

    def __init__(self, memory: PagedMemory, num_slots: int, since: int) -> None:
        self.num_slots = num_slots
        self.since = since
        assert memory.kv.whole is not None, "K and V are on the host"
        self._memory = memory  # its tensors are read and written by address
        log = [memory.log.view(-1, KV_BLOCK_TOKENS * memory.log.shape[1])] if memory.has_log else []
        self._parts = [(part.data_ptr(), part[0].nbytes) for part in (*memory.kv.whole, *log)]
        self._slot_bytes = sum(size for _, size in self._parts)
        self._kept = torch.empty(num_slots * self._slot_bytes, dtype=torch.uint8)

    def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        for block_id, slot in zip(block_ids, slots, strict=True):
            place = self._place(slot)
            for start, size in self._parts:
                ctypes.memmove(place, start + block_id * size, size)
                place += size

    def restore(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        for slot, block_id in zip(slots, block_ids, strict=True):
            place = self._place(slot)
            for start, size in self._parts:
                ctypes.memmove(start + block_id * size, place, size)
                place += size

    def _place(self, slot: int) -> int:
        return self._kept.data_ptr() + slot * self._slot_bytes


class DeviceTier:
    """A slot holds the rows of a block, as mirrors get them."""

    def __init__(self, memory: PagedMemory, num_slots: int, since: int) -> None:
        self.num_slots = num_slots
        self.since = since
        self._memory = memory
        shape = (num_slots, *memory.kv.shape.of_rows(KV_BLOCK_TOKENS))
        self._keys, self._values = (torch.empty(shape, dtype=memory.kv.shape.dtype) for _ in range(2))
        num_logged = KV_BLOCK_TOKENS if memory.has_log else 0
        self._hidden = torch.empty((num_slots, num_logged, memory.log.shape[1]), dtype=memory.log.dtype)

    def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        for positions, batch in _in_batches(block_ids, slots):
            rows = self._memory.rows(positions)
            for place, slot in enumerate(batch):
                own = slice(place * KV_BLOCK_TOKENS, (place + 1) * KV_BLOCK_TOKENS)
                self._keys[slot], self._values[slot] = rows.keys[:, own], rows.values[:, own]
                self._hidden[slot] = rows.hidden[own]

    def restore(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        for positions, batch in _in_batches(block_ids, slots):
            keys, values = _in_a_row(self._keys[batch]), _in_a_row(self._values[batch])
            self._memory.put_rows(positions, Rows(keys, values, self._hidden[batch].flatten(0, 1)))


def _in_batches(block_ids: Sequence[int], slots: Sequence[int]) -> Iterator[tuple[Tensor, list[int]]]:
    """Yields positions and slots of at most DEVICE_BLOCKS blocks at a time."""
    for start in range(0, len(slots), DEVICE_BLOCKS):
        batch = slice(start, start + DEVICE_BLOCKS)
        yield positions_of_blocks(torch.tensor(block_ids[batch], dtype=torch.int64)), list(slots[batch])


def _in_a_row(blocks: Tensor) -> Tensor:
    """Turns [B, L, 32, H, W] into [L, B * 32, H, W]."""
    return blocks.transpose(0, 1).flatten(1, 2)


def read_pairs(frame: TensorFrame, limits: tuple[int, int], name: str) -> list[tuple[int, int]]:
    """Returns what a step copies, from where to where. `limits`: there are so many places of either kind. Raises
    ProtocolError for others."""
    pairs: Int32Array = frame_to_array(frame, "int32", (None, 2), name)
    if len(pairs) and not (pairs.min() >= 0 and (pairs.max(axis=0) < limits).all()):
        raise ProtocolError(f"{name} names a place outside of {limits[0]} and {limits[1]}")
    return [(source, target) for source, target in pairs.tolist()]


def restored_positions(step: Step) -> Tensor:
    """Returns where in paged memory a step, which was read before, has brought something back; int64 [B * 32]."""
    pairs: Int32Array = frame_to_array(step.restores, "int32", (None, 2), "Step.restores")
    return positions_of_blocks(torch.from_numpy(pairs[:, 1].astype(np.int64)))
