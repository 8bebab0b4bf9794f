"""Which copy of each shard answers one call. Pure.

The call's shards are dealt greedily, busiest first, to the copy with the least work, counting what is outstanding
there already: two nodes with full copies share a token's experts equally, and a node that lags gets less. A shard's
rows of one call stay together, since a second node that reads the same weights doubles the memory traffic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import NodeLostError

WEIGHT_READ_ROWS = 8
"""Reading a shard's weights takes about as long as computing so many rows with them (measured on a CPU)."""


def choose_copies(
    rows_by_shard: Mapping[int, int], holders: Sequence[Sequence[int]], outstanding_rows: Mapping[int, int]
) -> dict[int, int]:
    """Shard key -> node, for every shard with rows.

    `holders[key]` are the usable nodes with a copy, first choice first; `outstanding_rows` what each node still owes.
    Raises NodeLostError if a shard has no usable copy.
    """
    load = {node: outstanding_rows.get(node, 0) for key in rows_by_shard for node in holders[key]}
    chosen: dict[int, int] = {}
    for key in sorted(rows_by_shard, key=lambda key: (-rows_by_shard[key], key)):
        copies = holders[key]
        if not copies:
            raise NodeLostError(f"no expert node holds shard {key} of this layer now")
        node = copies[0] if len(copies) == 1 else min(copies, key=lambda node: load[node])
        load[node] += rows_by_shard[key] + WEIGHT_READ_ROWS
        chosen[key] = node
    return chosen
