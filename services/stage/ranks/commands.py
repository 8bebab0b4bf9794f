"""What rank 0 tells the other ranks, all of it in one order: a command of numbers, and tensors that go with it.

Every rank runs the same forward passes. But answers of experts reach a stage in any order, and its micro-batches go on
in that order, which only rank 0 sees. So it says which batch begins and which one goes on, and with what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from common.ids import Generation, LeaseTerm, PipelineId, SlotIndex
from common.topology import LayerRange, StageRole, StageSlot
from services.stage.model.tp_shard import TpShard

TENSOR_ALIGNMENT = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.int32)


@dataclass(frozen=True, slots=True)
class BeginBatch:
    """A forward pass begins. With it go the tensors of its micro-batch."""

    number: int
    oldest: int
    """The oldest batch that is not through; what is left of those before was dropped."""


@dataclass(frozen=True, slots=True)
class Resume:
    """A forward pass goes on. With it goes the answer of its experts, [T, D]."""

    number: int


@dataclass(frozen=True, slots=True)
class LoadShard:
    """The ranks load weights beside those that they use. With it go the seats of the ranks in order, int64 [degree]."""

    number: int
    degree: int
    first_layer: int
    stop_layer: int
    slot: int
    num_slots: int
    dtype: torch.dtype
    adds_partial_sums: bool
    num_parts: int
    """See TpShard."""
    replaces: bool
    """What is in use makes room first."""

    @property
    def role(self) -> StageRole:
        """Returns the role, as far as it matters to what is loaded."""
        slot = StageSlot(PipelineId(0), SlotIndex(self.slot))
        layers = LayerRange(self.first_layer, self.stop_layer)
        return StageRole(slot, layers, LeaseTerm(0), Generation(0), self.num_slots)

    def shard(self, rank: int) -> TpShard:
        """Returns what a rank is to load."""
        return TpShard(rank, self.degree, "fast" if self.adds_partial_sums else "ordered", self.num_parts)


@dataclass(frozen=True, slots=True)
class UseShard:
    """From now on the ranks work with what they have loaded under this number."""

    number: int
    port: int
    """The port of the rendezvous store; 0: none is needed."""


@dataclass(frozen=True, slots=True)
class OpenMemory:
    """Where K and V are; of ranks with K and V of their own, the window through which they go in and out."""

    process: int
    descriptor: int
    num_bytes: int
    num_layers: int
    num_blocks: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class ForgetMemory:
    """The ranks unmap it, and give up K and V of their own."""


@dataclass(frozen=True, slots=True)
class ForgetLoads:
    """What was loaded and is not in use is given up."""


@dataclass(frozen=True, slots=True)
class AllocateKv:
    """Each rank gets zeroed K and V of its own, for the heads of the part in use."""

    number: int


@dataclass(frozen=True, slots=True)
class MoveKv:
    """What so many positions hold goes out of a rank's own K and V into the window, or the other way."""

    goes_out: bool
    count: int


Command = BeginBatch | Resume | LoadShard | UseShard | OpenMemory | ForgetMemory | ForgetLoads | AllocateKv | MoveKv
_KINDS: tuple[type[Command], ...] = get_args(Command)
_PLANS = {kind: [(field.name, get_type_hints(kind)[field.name]) for field in fields(kind)] for kind in _KINDS}


def encode(command: Command, tensors: Sequence[Tensor] = ()) -> tuple[list[int], Tensor]:
    """Returns a command with the description of its tensors, of one or two dimensions, and their bytes."""
    kind = type(command)
    values = [_KINDS.index(kind)]
    for name, hint in _PLANS[kind]:
        value = getattr(command, name)
        values.append(_DTYPES.index(value) if hint is torch.dtype else int(value))
    for tensor in tensors:
        shape = tensor.shape
        values += (_DTYPES.index(tensor.dtype), shape[0], shape[1] if len(shape) == 2 else -1)
    data = torch.empty(sum(_padded(tensor.nbytes) for tensor in tensors), dtype=torch.uint8)
    for place, tensor in zip(_places(data, values[1 + len(_PLANS[kind]) :]), tensors, strict=True):
        place.copy_(tensor)
    return values, data


def decode(values: Sequence[int], data: Tensor) -> tuple[Command, list[Tensor]]:
    """Returns what `encode` was given; the tensors are views of the bytes."""
    kind = _KINDS[values[0]]
    hints = [hint for _, hint in _PLANS[kind]]
    given = values[1 : 1 + len(hints)]
    made: list[Any] = [
        _DTYPES[value] if hint is torch.dtype else hint(value) for hint, value in zip(hints, given, strict=True)
    ]
    return kind(*made), _places(data, values[1 + len(hints) :])


def _places(data: Tensor, descriptions: Sequence[int]) -> list[Tensor]:
    """Returns tensors one after another, each as three numbers describe it."""
    places, start = [], 0
    for dtype, rows, columns in zip(*(iter(descriptions),) * 3, strict=True):
        num_bytes = _DTYPES[dtype].itemsize * rows * max(columns, 1)
        shape = (rows,) if columns < 0 else (rows, columns)
        places.append(data[start : start + num_bytes].view(_DTYPES[dtype]).view(shape))
        start += _padded(num_bytes)
    return places


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
