"""The second tier of a pipeline's cache: which blocks that had to make room lie in which slot of the stages' memory.

A *tier slot* holds one block of all layers of a stage, on its host; all stages of a pipeline have the same number of
them. A block is saved with the step for which another request gets it, and is found once that step is answered: then
every stage has it. It comes back by a copy into a fresh block. A slot that a step in flight reads or writes is given to
nobody.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from common.ids import StepId
from services.router.scheduling.blocks.key_chain import BlockKey


@dataclass(slots=True)
class TierCounters:
    """What was counted since the start, over all pipelines; each only grows."""

    blocks_saved: int = 0
    blocks_restored: int = 0
    """Blocks that a request has got back."""
    tokens_restored: int = 0
    """Prompt tokens of these that the request had not computed before."""
    blocks_dropped: int = 0
    """Blocks that found no room, and those that were here and are not any more."""


@dataclass(slots=True)
class _Kept:
    """A block in the tier."""

    slot: int
    step: int = 0
    """Which step has saved it; 0: it is not answered yet."""


class SessionTier:
    """The tier of one pipeline. It knows no requests, and of blocks only their keys."""

    def __init__(self, num_slots: int, counters: TierCounters) -> None:
        """No slots: nothing is kept."""
        self.num_slots = num_slots
        self._counters = counters
        self._kept: OrderedDict[BlockKey, _Kept] = OrderedDict()
        """What goes next comes first."""
        self._free = list(range(num_slots))  # a heap; the lowest go first: few pages of the stages' memory are touched
        self._leaving: list[tuple[int, BlockKey]] = []
        """Blocks that were given to others since a step was planned last."""
        self._saving: dict[StepId, list[BlockKey]] = {}
        self._reading: dict[StepId, tuple[int, ...]] = {}
        self._readers: Counter[int] = Counter()
        self._held: frozenset[int] = frozenset()
        """Slots that the step which is being planned is to read."""

    @property
    def num_kept(self) -> int:
        """Counts slots in use."""
        return len(self._kept)

    def find(self, key: BlockKey) -> int | None:
        """Returns the slot of a key."""
        kept = self._kept.get(key)
        return kept.slot if kept is not None and kept.step else None

    def keep(self, key: BlockKey, block_id: int) -> None:
        """Notes that a cached block is given to another request: the step that is planned next saves it first, unless
        it lies here already, or all slots are in use by steps in flight."""
        if not self.num_slots:
            return
        if key in self._kept:
            self._kept.move_to_end(key)
        elif (slot := self._free_slot()) is None:
            self._counters.blocks_dropped += 1
        else:
            self._kept[key] = _Kept(slot)
            self._leaving.append((block_id, key))

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Notes that these are needed: the last goes last, when others need room."""
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)

    def hold(self, slots: Iterable[int]) -> None:
        """Keeps slots that the next step is to read, while room is made for what it needs."""
        self._held = self._held.union(slots)

    def begin_step(self, step: StepId, block_ids: Collection[int], slots: Iterable[int]) -> tuple[tuple[int, int], ...]:
        """Notes that a step is planned, which gives its requests these blocks, and reads these slots. Returns the block
        and the slot of each that is to be saved before. What was to make room and is not given away is not saved."""
        leaving, self._leaving, self._held = self._leaving, [], frozenset()
        saves: list[tuple[int, int]] = []
        for block_id, key in leaving:
            if block_id in block_ids:
                saves.append((block_id, self._kept[key].slot))
                self._saving.setdefault(step, []).append(key)
            else:
                self._drop(key)
        if reading := tuple(slots):
            self._reading[step] = reading
            self._readers.update(reading)
        return tuple(saves)

    def end_step(self, step: StepId, *, is_done: bool) -> None:
        """Notes that a step was answered; or it is void, and nothing is known of what it was to save."""
        for key in self._saving.pop(step, ()):
            if is_done:
                self._kept[key].step = step
                self._counters.blocks_saved += 1
            else:
                self._drop(key)
        self._readers.subtract(self._reading.pop(step, ()))
        self._readers = +self._readers

    def note_back(self, keys: Iterable[BlockKey]) -> None:
        """Notes that these are in blocks again: their slots are the first to go, and need not be written again before
        that."""
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key, last=False)

    def retain(self, after: int, upto: int | None) -> None:
        """Keeps what a step after `after` and up to `upto` has saved (None: any): all holders still have that. Nothing
        is in flight."""
        self._leaving, self._held = [], frozenset()
        for key in [key for key, kept in self._kept.items() if not _is_within(kept.step, after, upto)]:
            self._drop(key)

    def _free_slot(self) -> int | None:
        if not self._free:
            oldest = next((key for key, kept in self._kept.items() if self._may_go(kept)), None)
            if oldest is None:
                return None
            self._drop(oldest)
        return heapq.heappop(self._free)

    def _may_go(self, kept: _Kept) -> bool:
        return kept.step > 0 and not self._readers[kept.slot] and kept.slot not in self._held

    def _drop(self, key: BlockKey) -> None:
        heapq.heappush(self._free, self._kept.pop(key).slot)
        self._counters.blocks_dropped += 1

    def check_invariants(self) -> None:
        """Raises AssertionError if a slot is lost or has two blocks, or one that is read or written is free."""
        used = [kept.slot for kept in self._kept.values()]
        assert sorted([*used, *self._free]) == list(range(self.num_slots)), "a tier slot is lost, or has two blocks"
        unanswered = {key for keys in self._saving.values() for key in keys} | {key for _, key in self._leaving}
        assert unanswered == {key for key, kept in self._kept.items() if not kept.step}, "a save is not in flight"
        assert self._readers == Counter(slot for slots in self._reading.values() for slot in slots), "reads are lost"
        assert self._readers.keys() <= set(used), "a slot is read and holds nothing"


def _is_within(step: int, after: int, upto: int | None) -> bool:
    return after < step and (upto is None or step <= upto)
