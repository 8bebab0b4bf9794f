"""What rank 0 tells the other ranks, all of it in one order. Commands are int64 values on the board.

Replies of experts reach a stage in any order, and its micro-batches go on in that order. Only rank 0 knows it: the
others have no forward pass of their own, they do one part of one layer at a time, as they are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum

import numpy as np
import torch

from common.wire.array import Int64Array
from services.stage.model.tp_shard import MAX_DEGREE, RankCut
from services.stage.ranks.shared_channel import COMMAND_VALUES


class Op(IntEnum):
    """Kinds of commands, with their values in order."""

    BATCH = 1
    """number, tokens, sequences, blocks of the longest table, first byte, bytes, number of the oldest batch that is not
    through. What a micro-batch is, in pieces."""
    ATTEND = 2
    """number of the batch, layer (from 0 within the stage), first row, stop row."""
    FEED = 3
    """layer, rows. A dense feed-forward layer."""
    EMBED = 4
    """rows."""
    PROJECT = 5
    """rows. The lm_head."""
    LOAD = 6
    """See LoadOrder."""
    USE = 7
    """number of the load, port of the rendezvous store (0: none is needed). From now on these weights, these ranks."""
    MEMORY = 8
    """process, descriptor, bytes, layers, blocks, dtype. Where K and V are; of ranks with K and V of their own, the
    window through which they go in and out."""
    FORGET_MEMORY = 9
    """Unmap it, and give up K and V of one's own."""
    FORGET_LOADS = 10
    """What was loaded and is not in use is given up."""
    ALLOCATE = 11
    """number. Zeroed K and V of one's own, for the heads of the part in use."""
    MOVE_KV = 12
    """which way (a KvMove), positions or blocks. Between one's own K and V and the window."""


class KvMove(IntEnum):
    """What goes through the window, and in which direction."""

    ROWS_OUT = 0
    ROWS_IN = 1
    BLOCKS_OUT = 2
    BLOCKS_IN = 3


_DTYPES = (torch.float32, torch.bfloat16)


def code_of(dtype: torch.dtype) -> int:
    """How a command says it."""
    return _DTYPES.index(dtype)


def dtype_of(code: int) -> torch.dtype:
    """What a command has said."""
    return _DTYPES[code]


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Which weights the ranks are to load beside those that they use."""

    number: int
    degree: int
    first_layer: int
    stop_layer: int
    is_first: int
    is_last: int
    dtype: int
    """By `code_of`."""
    adds_partial_sums: int
    num_parts: int
    """See RankCut."""
    replaces: int
    """1: what is in use makes room first."""


def encode_load(order: LoadOrder, ranks: Sequence[int]) -> list[int]:
    """`ranks`: of each seat, -1 for none."""
    assert len(ranks) <= MAX_DEGREE
    return [Op.LOAD, *astuple(order), *ranks, *[-1] * (MAX_DEGREE - len(ranks))]


def decode_load(command: Int64Array, seat: int) -> tuple[LoadOrder, int, tuple[int, ...]]:
    """The order, the rank of a seat (-1: none), and the seats of all ranks, in order."""
    values = command.tolist()
    num_values = len(LoadOrder.__slots__)
    order = LoadOrder(*values[1 : 1 + num_values])
    ranks = values[1 + num_values : 1 + num_values + MAX_DEGREE]
    return order, ranks[seat], tuple(ranks.index(rank) for rank in range(order.degree))


def cut_of(order: LoadOrder, rank: int) -> RankCut:
    """What a rank is to load."""
    return RankCut(rank, order.degree, "fast" if order.adds_partial_sums else "ordered", order.num_parts)


def write_command(command: Int64Array, values: Sequence[int]) -> None:
    """Put it on the board; the rest is 0."""
    padded = np.zeros(COMMAND_VALUES, dtype=np.int64)
    padded[: len(values)] = values
    command[:] = padded
