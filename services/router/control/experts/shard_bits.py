"""Which of many nodes hold which of many shards, as bits. Pure.

With 64 nodes and 15,000 shards a table of bytes is 1 MB: it fits no cache, and each new one is fetched from the system
page by page, which takes ten times as long as the work on it. In bits it is 120 KB.

N nodes, P shards, W words of 64 shards each, C places in a list of nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from common.wire.array import BoolArray, Int32Array, Int64Array, Uint8Array

NOBODY = -1
ShardBits = npt.NDArray[np.uint64]
"""[W] of one node or [N, W] of several. Beyond the last shard all bits are 0."""
_FIRST_BIT: Final = np.uint8(0x80)


def num_words(num_shards: int) -> int:
    """Counts the words that this many shards take."""
    return -(-num_shards // 64)


def pack(is_held: BoolArray) -> ShardBits:
    """Returns [..., P] as bits [..., W]."""
    *nodes, num_shards = is_held.shape
    padded = np.zeros((*nodes, 8 * num_words(num_shards)), dtype=np.uint8)
    padded[..., : -(-num_shards // 8)] = np.packbits(is_held, axis=-1)
    return padded.view(np.uint64)


def stack(rows: Sequence[ShardBits], num_shards: int) -> ShardBits:
    """Returns rows [W] as a table [N, W], also where there are none."""
    return np.array(rows, dtype=np.uint64).reshape(len(rows), num_words(num_shards))


def unpack(bits: ShardBits, num_shards: int) -> BoolArray:
    """Returns bits [..., W] as [..., P]."""
    return np.unpackbits(bits.view(np.uint8), axis=-1, count=num_shards).view(np.bool_)


def count(bits: ShardBits) -> Int64Array:
    """Counts each node's shards, [...]."""
    num_shards: Int64Array = np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)
    return num_shards


def from_pairs(nodes: Int32Array, shards: Int32Array, num_nodes: int, num_shards: int) -> ShardBits:
    """Returns [N, W] with these pairs of a node and a shard, of which none comes twice."""
    table = np.zeros((num_nodes, num_words(num_shards)), dtype=np.uint64)
    np.add.at(_flat(table), *_place(table, nodes, shards))  # many times as fast as `bitwise_or.at`
    return table


def pairs(table: ShardBits) -> tuple[Int64Array, Int64Array]:
    """Returns the nodes and the shards of all pairs in [N, W], by node, then by shard."""
    flat, row_bytes = _flat(table), 8 * table.shape[1]
    filled = np.flatnonzero(flat != 0)
    which, bit = np.divmod(np.flatnonzero(np.unpackbits(flat[filled]).view(np.bool_)), 8)
    nodes, byte = np.divmod(filled[which], row_bytes)
    return nodes, 8 * byte + bit


def are_in(table: ShardBits, nodes: Int32Array) -> BoolArray:
    """Returns which nodes [C, P] have the shard in whose column they stand; NOBODY has none. `table`: [N, W]."""
    if not table.size:
        return np.zeros(nodes.shape, dtype=np.bool_)
    place, bit = _place(table, nodes, np.arange(nodes.shape[1], dtype=np.int32))
    is_there: BoolArray = ((_flat(table)[place] & bit) != 0) & (nodes != NOBODY)
    return is_there


def by_shard(nodes: Int64Array, shards: Int64Array, num_shards: int) -> Int32Array:
    """Returns [C, P], C at least 1: the nodes of each shard in the order in which these pairs name them, NOBODY below
    them."""
    order = np.argsort(shards, kind="stable")
    nodes, shards = nodes[order], shards[order]
    depth = np.arange(shards.size) - np.searchsorted(shards, shards)
    table = np.full((1 + int(depth.max(initial=0)), num_shards), NOBODY, dtype=np.int32)
    table[depth, shards] = nodes
    return table


def _flat(table: ShardBits) -> Uint8Array:
    return table.view(np.uint8).reshape(-1)


def _place(table: ShardBits, nodes: Int32Array, shards: Int32Array) -> tuple[Int32Array, Uint8Array]:
    """Returns where pairs are: the byte in the flat table, and the bit of it."""
    return nodes * (8 * table.shape[1]) + (shards >> 3), _FIRST_BIT >> (shards & 7).astype(np.uint8)
