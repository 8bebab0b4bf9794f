"""KV blocks of one pipeline: which are free, and how many hold each of the others.

Cached blocks that nobody holds count as free, and are given out last.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from services.router.scheduling.blocks.prefix_cache import PrefixCache, PrefixCounters


class BlockAllocator:
    """Gives out block ids [0, num_blocks) with reference counts.

    The lowest free ids go first: what is handed out then depends on what is held, not on the order in which the rest
    was given back, so that a run can be repeated, and a lightly loaded pool touches few pages of the stages' memory.
    """

    def __init__(self, num_blocks: int, counters: PrefixCounters | None = None, num_tier_slots: int = 0) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least 1 block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.cache = PrefixCache(counters or PrefixCounters(), num_tier_slots)
        """What is in there is entered by others. While it is empty, every block that nobody holds is in the heap."""
        self._free = list(range(num_blocks))  # a heap; an ascending list is one
        self._reference_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Counts the blocks that are not held."""
        return len(self._free) + self.cache.num_idle

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """Returns `count` blocks with one reference each; None, and nothing, if there are fewer. Those that hold
        nothing come first, ascending."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        if count > self.num_free:
            return None
        block_ids = tuple(heapq.heappop(self._free) if self._free else self.cache.evict() for _ in range(count))
        for block_id in block_ids:
            self._reference_counts[block_id] = 1
        return block_ids

    def claim(self, block_ids: Iterable[int]) -> bool:
        """Claims these very blocks. Returns False, and claims none, if one is held, cached, named twice or not
        there."""
        wanted = list(block_ids)
        free = set(self._free)
        if len(set(wanted)) != len(wanted) or not free.issuperset(wanted):
            return False
        self._free = sorted(free.difference(wanted))  # an ascending list is a heap
        for block_id in wanted:
            self._reference_counts[block_id] = 1
        return True

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to each. Raises ValueError for a block that is neither held nor cached."""
        block_ids = tuple(block_ids)
        for block_id in block_ids:
            if self.reference_count(block_id) == 0 and not self.cache.is_idle(block_id):
                raise ValueError(f"block {block_id} is free and cannot be shared")
        for block_id in block_ids:
            if self._reference_counts[block_id] == 0:
                self.cache.wake(block_id)
            self._reference_counts[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Takes a reference from each; one without any is free again. Of those that stay cached the first goes first,
        when others need room. Raises ValueError for a block that is free."""
        for block_id in block_ids:
            if self.reference_count(block_id) == 0:
                raise ValueError(f"block {block_id} is freed twice")
            self._reference_counts[block_id] -= 1
            if self._reference_counts[block_id] == 0 and not self.cache.rest(block_id):
                heapq.heappush(self._free, block_id)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Lets the cache forget what these blocks hold."""
        for block_id in self.cache.drop(block_ids):
            heapq.heappush(self._free, block_id)

    def reference_count(self, block_id: int) -> int:
        """Returns how many hold this block; ValueError outside the pool."""
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block {block_id} is outside the pool of {self.num_blocks} blocks")
        return self._reference_counts[block_id]

    def check_invariants(self) -> None:
        """Raises AssertionError if a block is both free and held, neither, or free twice."""
        self.cache.check_invariants()
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        idle = {block_id for block_id in range(self.num_blocks) if self.cache.is_idle(block_id)}
        assert free.isdisjoint(idle), "a cached block is in the free list"
        free |= idle
        for block_id, count in enumerate(self._reference_counts):
            assert count >= 0, f"block {block_id} has {count} references"
            assert (count == 0) == (block_id in free), f"block {block_id}: {count} references, free: {block_id in free}"
