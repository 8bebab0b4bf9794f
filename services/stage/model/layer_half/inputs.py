"""What goes into the half of a layer, and what comes out.

T tokens, D model width, K experts a token, Q sequences, B blocks in the longest table, N head width.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from common.compute.rms_norm import Norm
from services.stage.model.attention import RotaryTable
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import LayerKvCache


@dataclass(frozen=True, slots=True)
class Attended:
    """What the half of a layer gives."""

    residual: Tensor
    """[T, D]: the residual stream after attention."""
    normed: Tensor
    """[T, D]: the norm of that, which the next network gets."""
    experts: Tensor | None = None
    """int64 [T, K]; None where what follows is no experts, or another rank asks them."""
    weights: Tensor | None = None
    """float32 [T, K]."""


class BatchDescriptor(ctypes.Structure):
    """`struct LayerBatch` of common/compute/native/layer_half.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "tables", "sequences", "positions", "slots")),
        *((name, ctypes.c_int64) for name in ("tokens", "max_blocks", "turned")),
    )


class LayerInputs:
    """What all layers of a forward pass get alike; each thing is made once, when a layer first asks for it."""

    def __init__(self, batch: MicroBatch, rotary: RotaryTable) -> None:
        self.batch = batch
        self.rotary = rotary

    @cached_property
    def rotary_rows(self) -> tuple[Tensor, Tensor]:
        """cos and signed sin [T, N] of the tokens."""
        return self.rotary.rows(self.batch.positions)

    @cached_property
    def descriptor(self) -> BatchDescriptor:
        """The batch as native kernels have it, which is valid as long as this object is.

        Raises ValueError when shapes or dtypes do not fit, IndexError for a position that the table does not have.
        Blocks and slots are trusted: check them where they come in.
        """
        batch, table = self.batch, self.rotary
        (num_tokens,) = batch.positions.shape
        of_tokens = (batch.row_sequence, batch.slots)
        if any(tensor.shape != (num_tokens,) for tensor in of_tokens) or batch.block_tables.dim() != 2:
            raise ValueError(f"{[tuple(tensor.shape) for tensor in batch.tensors()]} do not fit {num_tokens} tokens")
        indices = (batch.block_tables, batch.row_sequence, batch.positions)
        if any(tensor.dtype != torch.int32 for tensor in indices) or batch.slots.dtype != torch.int64:
            raise ValueError("block_tables, row_sequence and positions are int32, and slots are int64")
        if not all(tensor.is_contiguous() for tensor in (*indices, batch.slots)):
            raise ValueError("the tensors of a micro-batch are contiguous")
        cos, sin = table.cos, table.signed_sin
        if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.shape[1] % 2:
            raise ValueError(f"tables {tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype} turn no pairs")
        if not cos.is_contiguous() or not sin.is_contiguous():
            raise ValueError("the rotary tables are contiguous")
        first, last = (int(bound) for bound in torch.aminmax(batch.positions))
        if first < 0 or last >= table.cos.shape[0]:
            raise IndexError(f"positions {first} to {last} for a table of {table.cos.shape[0]}")
        addressed = (table.cos, table.signed_sin, *indices, batch.slots)
        return BatchDescriptor(
            *(tensor.data_ptr() for tensor in addressed), num_tokens, batch.block_tables.shape[1], table.cos.shape[1]
        )


class LayerHalf(Protocol):
    """From what one feed-forward network gives to what the next one gets."""

    @property
    def input_norm(self) -> Norm:
        """The norm that comes first."""

    def __call__(self, x: Tensor, fed: Tensor | None, inputs: LayerInputs, cache: LayerKvCache) -> Attended:
        """`x` is the residual stream [T, D], `fed` what the network before adds to it (None: there is none before).

        Where there is a network before, x is given up: its memory may become that of the residual stream after it.
        """
