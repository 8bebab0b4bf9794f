"""Which blocks of a pipeline's pool hold which beginnings of texts, and which of them go first when others need room.

It knows no requests. The allocator counts who holds a block, and tells this table when nobody does any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.router.scheduling.blocks.key_chain import BlockKey
from services.router.scheduling.blocks.session_tier import SessionTier, TierCounters


@dataclass(slots=True)
class PrefixCounters:
    """What was counted since the start, over all pipelines; each only grows."""

    tokens_asked: int = 0
    """Prompt tokens of requests that looked for cached ones."""
    tokens_found: int = 0
    """Those of them that were found, in blocks or in the session tier."""
    blocks_found: int = 0
    blocks_entered: int = 0
    blocks_evicted: int = 0
    """Cached blocks that were given to others."""
    tier: TierCounters = field(default_factory=TierCounters)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A cached block."""

    key: BlockKey
    step: int
    """By this step every slot's holder had all of it."""


class PrefixCache:
    """The cached blocks of one pipeline. A block is cached under one key at most, and a key names one block."""

    def __init__(self, counters: PrefixCounters, num_tier_slots: int = 0) -> None:
        self.counters = counters
        self.tier = SessionTier(num_tier_slots, counters.tier)
        """Where blocks go that are given to others."""
        self._entries: dict[int, _Entry] = {}
        self._blocks: dict[BlockKey, int] = {}
        self._idle: dict[int, None] = {}
        """Those that nobody holds; the one whose last holder left first comes first."""
        self._spoilt: set[int] = set()
        """Held blocks whose content is not what their tokens make: nothing behind them is cached either."""

    @property
    def num_blocks(self) -> int:
        """Counts cached blocks, held or not."""
        return len(self._entries)

    @property
    def num_idle(self) -> int:
        """Counts those that nobody holds: they count as free."""
        return len(self._idle)

    def find(self, key: BlockKey) -> int | None:
        """Returns the block of a key."""
        return self._blocks.get(key)

    def is_cached(self, block_id: int) -> bool:
        """Returns whether the block can be found."""
        return block_id in self._entries

    def is_idle(self, block_id: int) -> bool:
        """Returns whether the block is cached and nobody holds it."""
        return block_id in self._idle

    def step_of(self, block_id: int) -> int:
        """Returns by which step a cached block was whole on all slots."""
        return self._entries[block_id].step

    def add(self, key: BlockKey, block_id: int, step: int) -> None:
        """Enters a block that somebody holds. Where the key has a block already, or the block a key, nothing changes:
        two that computed the same at once."""
        assert block_id not in self._spoilt, "what is spoilt is not cached"
        if key not in self._blocks and block_id not in self._entries:
            self.counters.blocks_entered += 1
            self._blocks[key] = block_id
            self._entries[block_id] = _Entry(key, step)

    def spoil(self, block_ids: Iterable[int]) -> None:
        """Notes that held blocks have content that must not be found."""
        spoilt = list(block_ids)
        assert self._idle.keys().isdisjoint(spoilt), "only what is held is written to"
        self.drop(spoilt)
        self._spoilt.update(spoilt)

    def is_spoilt(self, block_ids: Iterable[int]) -> bool:
        """Returns whether one of these blocks is spoilt."""
        return bool(self._spoilt) and not self._spoilt.isdisjoint(block_ids)

    def behind(self, marks: Sequence[int]) -> list[int]:
        """Returns the cached blocks that a holder lacks, or may lack. `marks`: up to which step each has everything."""
        oldest = min(marks, default=None)
        return [] if oldest is None else [block for block, entry in self._entries.items() if entry.step > oldest]

    def resume_tier(self, num_tier_slots: int, after: int, marks: Sequence[int]) -> None:
        """Keeps of the tier what all holders still have: what steps behind `after` and up to their marks have saved. Of
        a tier of another size that is nothing."""
        self.tier.retain(after, min(marks, default=None))
        if num_tier_slots != self.tier.num_slots:
            self.tier.retain(0, 0)
            self.tier = SessionTier(num_tier_slots, self.counters.tier)

    # What the allocator tells and asks

    def rest(self, block_id: int) -> bool:
        """Notes that nobody holds the block any more. Returns whether it stays cached; else it is free."""
        self._spoilt.discard(block_id)
        if block_id not in self._entries:
            return False
        self._idle[block_id] = None
        return True

    def wake(self, block_id: int) -> None:
        """Notes that somebody holds a block again that nobody held."""
        del self._idle[block_id]

    def evict(self) -> int:
        """Returns the block that nobody has held for longest, which is cached no more. There must be one."""
        block_id = next(iter(self._idle))
        self.tier.keep(self._entries[block_id].key, block_id)
        self.drop([block_id])
        self.counters.blocks_evicted += 1
        return block_id

    def drop(self, block_ids: Iterable[int]) -> list[int]:
        """Forgets what these blocks hold. Returns those that nobody holds: they are free now."""
        idle = []
        for block_id in block_ids:
            entry = self._entries.pop(block_id, None)
            if entry is not None:
                del self._blocks[entry.key]
            if block_id in self._idle:
                del self._idle[block_id]
                idle.append(block_id)
        return idle

    def check_invariants(self) -> None:
        """Raises AssertionError if keys and blocks do not name each other, or tier slots do not add up."""
        self.tier.check_invariants()
        assert {entry.key: block for block, entry in self._entries.items()} == self._blocks, "a key has another block"
        assert self._idle.keys() <= self._entries.keys(), "a block rests and is not cached"
        assert self._spoilt.isdisjoint(self._entries), "a spoilt block is cached"
