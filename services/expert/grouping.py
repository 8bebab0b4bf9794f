"""Waiting calls -> one grouped FFN per layer. Pure: numpy, no sockets.

R routed rows over all calls of a layer, S slices an expert; a shard key is expert * S + slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.wire.array import Int32Array, Int64Array


@dataclass(frozen=True, slots=True)
class Grouping:
    """How the rows of several calls stand when sorted by shard."""

    order: Int64Array
    """[R]: place in the calls' concatenated rows of each sorted row."""
    keys: tuple[int, ...]
    """Shard key of each group, ascending."""
    offsets: tuple[int, ...]
    """[groups + 1]: sorted rows [offsets[i], offsets[i+1]) belong to keys[i]."""

    @property
    def is_sorted(self) -> bool:
        """Returns whether the rows already stood in order, as those of a single call do."""
        return bool((self.order[1:] > self.order[:-1]).all())


def group_rows(routings: Sequence[Int32Array], num_slices: int) -> Grouping:
    """Groups the rows of calls by shard; `routings` are their [3, R_i] arrays (row, expert, slice)."""
    keys = np.concatenate([routing[1].astype(np.int64) * num_slices + routing[2] for routing in routings])
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))) if keys.size else np.zeros(0, int)
    return Grouping(order, tuple(ordered[starts].tolist()), (*starts.tolist(), int(keys.size)))
