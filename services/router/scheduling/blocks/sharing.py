"""What the requests of one pipeline share: who finds which cached blocks, who waits for whom, what is entered.

A block is whole once a step that completes it is answered: then it is entered, and nobody writes into it any more but a
replay, which writes the same. Cached is what a chain of such blocks leads to from position 0. A block that a step
planned ahead completes has no name before that: one of its tokens is not known. If the request has ended meanwhile,
it gets none, and is free once that step is back.

What had to make room for others may lie in the session tier. A request gets it back as if it computed it: a chunk in
fresh blocks, which is in flight like any other, and is whole once its step is answered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from common.ids import StepId
from services.router.scheduling.blocks.block_allocator import BlockAllocator
from services.router.scheduling.blocks.key_chain import BlockKey
from services.router.scheduling.request import Blame, Request
from services.router.scheduling.step_plan import ComputedBy, ScheduledChunk

MAX_RESTORED_BLOCKS = 32
"""Blocks that one step brings back from the session tier, of all requests: copying them takes some ms, for which
whoever decodes in that step waits."""
MAX_FAILURES_RESTORING = 1
"""Who has had more failed steps in a row computes what it could get back: perhaps they failed by that."""


class PrefixSharing:
    """See the module."""

    def __init__(self, allocator: BlockAllocator, block_tokens: int, blame: Blame, *, is_on: bool) -> None:
        """Not `is_on`: nothing is entered, so nothing is found, and nobody waits."""
        self._allocator = allocator
        self._blame = blame
        self._cache = allocator.cache
        self._block_tokens = block_tokens
        self._is_on = is_on
        self.numeric_class = 0
        """By which the newest step was computed that was not of several; 0: none was yet, in this generation."""
        self._lacking: set[int] = set()
        """Blocks that a replay has to rebuild, and has not rebuilt yet."""
        self._is_of_several = False
        """Whether the newest step was of no one class: nothing of such a step is entered."""

    # Finding

    def find(self, request: Request) -> list[int]:
        """Returns the longest chain of cached blocks that goes on where its own end; not with its last token, which
        must be computed. For one that waits, as if it ran here."""
        if not self._may_find(request):
            return []
        found: list[int] = []
        for index in range(len(request.block_table), self._num_findable(request)):
            block_id = self._cache.find(request.block_key(index, self.numeric_class))
            if block_id is None:
                break
            found.append(block_id)
        return found

    def begin(self, request: Request) -> None:
        """Lets a request that begins to run here have what it finds."""
        if self._takes_part(request) and not request.has_asked and not request.max_computed_tokens:
            request.has_asked = True
            self._cache.counters.tokens_asked += len(request.generation_request.prompt_token_ids)
        self.take(request)

    def take(self, request: Request) -> None:
        """Lets a request that runs here have what it finds now."""
        if found := self.find(request):
            self._allocator.share(found)
            request.numeric_class = self.numeric_class
            num_before = request.num_found_tokens
            request.take_blocks(found, [self._cache.step_of(block_id) for block_id in found])
            self._cache.counters.blocks_found += len(found)
            self._cache.counters.tokens_found += request.num_found_tokens - num_before

    def num_found(self, request: Request) -> int:
        """Counts the tokens that a request which waits would find, in blocks or in the session tier."""
        if not self._may_find(request):
            return 0
        for index in range(len(request.block_table), self._num_findable(request)):
            key = request.block_key(index, self.numeric_class)
            if self._cache.find(key) is None and self._cache.tier.find(key) is None:
                return index * self._block_tokens
        return self._num_findable(request) * self._block_tokens

    def find_kept(self, request: Request, num_restored: int = 0) -> list[int]:
        """Returns the tier slots of the blocks that a request which runs here needs next, and that are in no block; as
        many as may come back in a step that brings back so many for others."""
        if not self._cache.tier.num_kept or not self._may_find(request):
            return []
        if request.num_failed_steps > MAX_FAILURES_RESTORING:
            return []
        slots: list[int] = []
        start = len(request.block_table)
        for index in range(start, min(start + MAX_RESTORED_BLOCKS - num_restored, self._num_findable(request))):
            key = request.block_key(index, self.numeric_class)
            slot = self._cache.tier.find(key)
            if slot is None or self._cache.find(key) is not None:
                break
            slots.append(slot)
        return slots

    def begin_restoring(self, request: Request, slots: Sequence[int]) -> None:
        """Notes that a request is to get what is in these tier slots, for which others make room: they stay, and what
        it needs behind them is the last to go."""
        if not slots:
            return
        self._cache.tier.hold(slots)
        indices = range(len(request.block_table), self._num_findable(request))
        self._cache.tier.touch(request.block_key(index, self.numeric_class) for index in reversed(indices))

    def begin_step(self, step: StepId, chunks: Collection[ScheduledChunk]) -> tuple[tuple[int, int], ...]:
        """Notes that a step with these chunks is planned. Returns block and tier slot of what it is to save first: that
        is overwritten by it."""
        given = {block_id for chunk in chunks for block_id in chunk.new_block_ids}
        read = [slot for chunk in chunks for slot in chunk.tier_slots]
        return self._cache.tier.begin_step(step, given, read)

    def holds(self, request: Request, count: int) -> bool:
        """Returns whether a request which waits would find so many blocks that others hold: they cost it no free
        ones."""
        if self._cache.num_blocks - self._cache.num_idle < count:
            return False  # it is asked in every turn while the request waits, and a long chain takes a millisecond
        return sum(not self._cache.is_idle(block_id) for block_id in self.find(request)) >= count

    def _may_find(self, request: Request) -> bool:
        """Returns whether nothing of it is under way, its own blocks are all whole, and of the class of now."""
        if not self._takes_part(request) or not self.numeric_class or request.steps or request.is_replaying:
            return False
        if request.was_misled:
            return False
        return request.num_computed_tokens == len(request.block_table) * self._block_tokens

    def _takes_part(self, request: Request) -> bool:
        if not self._is_on or not request.generation_request.uses_cache:
            return False
        is_of_now = request.numeric_class in (None, self.numeric_class or None)  # nothing of class 0 is entered
        return is_of_now and not self._cache.is_spoilt(request.block_table)

    def _num_findable(self, request: Request) -> int:
        return (request.num_tokens - 1) // self._block_tokens

    # Waiting for one another

    def without_followers(self, prefilling: Sequence[Request]) -> list[Request]:
        """Leaves out those whose next block an older one is about to compute. `prefilling`: all that are to be
        prefilled here, by arrival; who has a step in flight stays, and so does who is awaited."""
        if not self._is_on or self._is_of_several or len(prefilling) < 2:
            return list(prefilling)
        leaders: dict[BlockKey, list[Request]] = {}
        """By the key of their first block."""
        left: list[Request] = []
        for request in prefilling:
            with self._blame.handling(request):
                if not self._takes_part(request) or request.num_tokens < self._block_tokens:
                    left.append(request)
                    continue
                alike = leaders.setdefault(request.block_key(0, self.numeric_class), [])
                if not self._is_follower(request, alike):
                    left.append(request)
                if not request.num_failed_steps:  # nobody waits for one that breaks its steps
                    alike.append(request)
        return left

    def _is_follower(self, request: Request, older: Iterable[Request]) -> bool:
        index = len(request.block_table)
        if request.steps or request.num_computed_tokens != index * self._block_tokens:
            return False
        if request.pace.due_since_s is not None:
            return False  # its step has failed: while it waited for another, it would seem to be stalled
        if index >= self._num_findable(request):
            return False
        own = request.block_key(index, self.numeric_class)
        stop = (index + 1) * self._block_tokens
        for other in older:
            if other.num_computed_tokens < stop <= other.num_tokens:
                with self._blame.handling(other):
                    if other.block_key(index, self.numeric_class) == own:
                        return True
        return False

    # Entering

    def note_answered(self, computed_by: ComputedBy) -> None:
        """Notes by whom a step was computed that was answered, whatever it carried: what is found now is of that
        class."""
        self.numeric_class = computed_by.numeric_class or self.numeric_class

    def is_misled(self, request: Request, computed_by: ComputedBy) -> bool:
        """Returns whether another class answers the first step behind blocks that a request has found, and no token of
        it is known yet: had it found nothing, all of it were of that class. So are its steps behind that one."""
        if not request.is_unconfirmed or request.generated_token_ids:
            return False
        return request.was_misled or computed_by.numeric_class not in (0, request.numeric_class)

    def note_computed(self, request: Request, chunk: ScheduledChunk, step: int, computed_by: ComputedBy) -> None:
        """Notes that a chunk of a request, which counts it already, was computed or replayed by a step that was
        answered."""
        if not self._is_on:
            return
        numeric_class = computed_by.numeric_class
        if request.numeric_class is None:
            request.numeric_class = numeric_class
        self._is_of_several = not numeric_class
        if not request.generation_request.uses_cache or not request.numeric_class:
            return
        if chunk.sequence_id in computed_by.degraded or numeric_class != request.numeric_class:
            stop = chunk.start_position + len(chunk.token_ids)
            self._cache.spoil(self._blocks(request, chunk.start_position, stop))
        if not request.is_replaying:
            self._enter(request, step, request.numeric_class)

    def note_restored(self, request: Request, chunk: ScheduledChunk, step: int, now_s: float) -> None:
        """Notes that a chunk of a request was brought back by a step that was answered: it counts as found."""
        assert request.numeric_class, "it was found under a class"
        first = chunk.start_position // self._block_tokens
        keys = [request.block_key(first + place, request.numeric_class) for place in range(len(chunk.tier_slots))]
        self._cache.tier.note_back(keys)
        num_before, counters = request.num_found_tokens, self._cache.counters
        request.note_restored(step, len(chunk.token_ids), now_s)
        num_found = request.num_found_tokens - num_before
        counters.blocks_found += len(keys)
        counters.tier.blocks_restored += len(keys)
        counters.tokens_found += num_found
        counters.tier.tokens_restored += num_found
        self._enter(request, step, request.numeric_class)

    def _enter(self, request: Request, step: int, numeric_class: int) -> None:
        num_whole = request.num_computed_tokens // self._block_tokens
        while request.num_entered_blocks < num_whole:
            index = request.num_entered_blocks
            if self._cache.is_spoilt(request.block_table[: index + 1]):
                return
            self._cache.add(request.block_key(index, numeric_class), request.block_table[index], step)
            request.num_entered_blocks += 1

    # Another router, another generation

    def claim(self, request: Request, block_ids: Sequence[int], num_computed: int, adopted: Iterable[Request]) -> bool:
        """Claims the blocks that a request has from a router before this one. It shares those that another one has at
        the same place, whole and with the same tokens. Returns False, and claims none, if one is held otherwise."""
        others, shared = list(adopted), []
        for index, block_id in enumerate(block_ids):
            if not self._allocator.reference_count(block_id):
                continue
            if not any(self._is_alike(request, other, index, block_id, num_computed) for other in others):
                return False
            shared.append(block_id)
        of_others = set(shared)
        if not self._allocator.claim(block_id for block_id in block_ids if block_id not in of_others):
            return False
        self._allocator.share(shared)
        return True

    def _is_alike(self, request: Request, other: Request, index: int, block_id: int, num_computed: int) -> bool:
        is_whole = (index + 1) * self._block_tokens <= min(num_computed, other.num_computed_tokens)
        if not is_whole or other.block_table[index] != block_id:
            return False
        return other.block_key(index, 0) == request.block_key(index, 0)

    def resume(self, running: Sequence[Request], kv_marks: Sequence[int]) -> None:
        """Forgets which class answers, and what a holder lacks, by its mark. `running` know by now what is to be
        replayed: nothing of that is cached, and all of its holders replay it, until it is whole again. Then it is
        entered again."""
        self.numeric_class = 0  # who computes now may be another
        self._allocator.forget(self._cache.behind(kv_marks))
        self._lacking = set()
        for request in running:
            request.num_entered_blocks = 0
            if request.is_replaying:
                self._lacking.update(self._blocks(request, request.replay_position, request.replay_stop))
        while any([self._joins_replay(request) for request in running]):
            pass  # what one lacks more may be held by those before it
        self._allocator.forget(self._lacking)

    def _joins_replay(self, request: Request) -> bool:
        """Lets a request replay from the first block on that another one has to rebuild: if that one goes without an
        expert, or ends before it is done, this one knows. Returns whether it replays more now."""
        start = request.replay_position if request.is_replaying else request.num_computed_tokens
        before = request.block_table[: start // self._block_tokens]
        first = next((index for index, block_id in enumerate(before) if block_id in self._lacking), None)
        if first is None:
            return False
        request.replay_from(first * self._block_tokens)
        self._lacking.update(self._blocks(request, request.replay_position, request.replay_stop))
        return True

    def skip_replayed(self, request: Request, last_step: int) -> None:
        """Lets a replay go on behind blocks that another one has rebuilt. `last_step`: the newest that was answered."""
        while request.is_replaying and not request.steps:
            index = request.replay_position // self._block_tokens
            if request.block_table[index] in self._lacking:
                return
            request.skip_replay(last_step, min((index + 1) * self._block_tokens, request.replay_stop))
            request.tell_anew()  # a stage counts nothing that stands behind a gap

    def num_to_replay(self, request: Request, others: set[int]) -> int:
        """Counts positions that it replays next: up to a block that an older one rebuilds. `others`: those blocks, to
        which what this one has to rebuild is added."""
        own = self._blocks(request, request.replay_position, request.replay_stop)
        first = next((place for place, block_id in enumerate(own) if block_id in others), None)
        others.update(own)
        if first is None:
            return request.replay_stop - request.replay_position
        stop = (request.replay_position // self._block_tokens + first) * self._block_tokens
        return max(0, stop - request.replay_position)

    def note_replayed(self, request: Request, start: int) -> None:
        """Notes that a request's positions from `start` to where its replay is now are there again."""
        whole = request.replay_position // self._block_tokens * self._block_tokens
        stop = whole if request.is_replaying else request.replay_position
        self._lacking.difference_update(self._blocks(request, start, stop))

    def check_is_its_own(self, request: Request, chunk: ScheduledChunk) -> None:
        """Raises AssertionError if a chunk is written to a block that others hold or may find."""
        for block_id in self._blocks(request, chunk.start_position, chunk.start_position + len(chunk.token_ids)):
            assert self._allocator.reference_count(block_id) == 1, f"{request.request_id} writes to block {block_id}"
            assert not self._cache.is_cached(block_id), f"block {block_id} is cached and written to"

    def _blocks(self, request: Request, start: int, stop: int) -> list[int]:
        """Returns the blocks that hold positions [start, stop)."""
        return request.block_table[start // self._block_tokens : -(-stop // self._block_tokens)]
