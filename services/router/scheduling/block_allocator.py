"""KV blocks of one pipeline: which are free, and how many hold each of the others."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class BlockAllocator:
    """Gives out block ids [0, num_blocks) with reference counts.

    The lowest free ids go first: what is handed out then depends on what is held, not on the order in which the rest
    was given back, so that a run can be repeated, and a lightly loaded pool touches few pages of the stages' memory.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least 1 block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))  # a heap; an ascending list is one
        self._reference_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Counts the blocks that are not held."""
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """Returns `count` blocks with one reference each, ascending; None, and nothing, if there are fewer."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        if count > len(self._free):
            return None
        block_ids = tuple(heapq.heappop(self._free) for _ in range(count))
        for block_id in block_ids:
            self._reference_counts[block_id] = 1
        return block_ids

    def claim(self, block_ids: Iterable[int]) -> bool:
        """Claims these very blocks. Returns False, and claims none, if one is held, named twice or not there."""
        wanted = list(block_ids)
        free = set(self._free)
        if len(set(wanted)) != len(wanted) or not free.issuperset(wanted):
            return False
        self._free = sorted(free.difference(wanted))  # an ascending list is a heap
        for block_id in wanted:
            self._reference_counts[block_id] = 1
        return True

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to each. Raises ValueError for a block that is not held."""
        block_ids = tuple(block_ids)
        for block_id in block_ids:
            if self.reference_count(block_id) == 0:
                raise ValueError(f"block {block_id} is free and cannot be shared")
        for block_id in block_ids:
            self._reference_counts[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Takes a reference from each; one without any is free again. Raises ValueError for a block that is free."""
        for block_id in block_ids:
            if self.reference_count(block_id) == 0:
                raise ValueError(f"block {block_id} is freed twice")
            self._reference_counts[block_id] -= 1
            if self._reference_counts[block_id] == 0:
                heapq.heappush(self._free, block_id)

    def reference_count(self, block_id: int) -> int:
        """Returns how many hold this block; ValueError outside the pool."""
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block {block_id} is outside the pool of {self.num_blocks} blocks")
        return self._reference_counts[block_id]

    def check_invariants(self) -> None:
        """Raises AssertionError if a block is both free and held, neither, or free twice."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        for block_id, count in enumerate(self._reference_counts):
            assert count >= 0, f"block {block_id} has {count} references"
            assert (count == 0) == (block_id in free), f"block {block_id}: {count} references, free: {block_id in free}"
