"""A mirror is its primary's memory, as far as it says: whatever is written while it is filled, and through any gap."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from common.messages import AssignMirror, Header, Message, MirrorAck, MirrorRows
from common.wire.codec import decode, encode
from common.wire.transport import Full, LinkEvent
from services.stage.model.kv_cache import PagedMemory, Rows, allocate_paged_memory
from services.stage.model.paged_attention import KV_BLOCK_TOKENS
from services.stage.slot.mirror_receiver import Mirror
from services.stage.slot.mirror_sender import (
    BACKFILL_BLOCKS,
    MAX_BACKFILL_AHEAD_BYTES,
    MAX_SILENCE_S,
    MAX_UNACKNOWLEDGED_BYTES,
    MirrorSender,
)
from tests.unit.stage.model.test_kv_cache import assert_equal

BLOCKS = 20
ROLE = AssignMirror(0, 0, 2, 0, 2, 5, BLOCKS, (), "")
TERM = 3
LOG: Any = structlog.get_logger()


def memory() -> PagedMemory:
    return allocate_paged_memory(2, BLOCKS, (2, 4), 8, torch.float32, with_log=True)


class Wire:
    """A socket whose messages arrive encoded, decoded and numbered, when somebody asks."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Any, Header]] = []
        self.num_sent = 0
        self.takes = True

    def send(self, message: Message, header: Header) -> None:
        if not self.takes:
            raise Full("full")
        self.num_sent += 1
        frames = encode(message, Header(header.router_term, 0, header.attempt, sequence_number=self.num_sent))
        self.waiting.append(decode([memoryview(bytearray(frame)) for frame in frames]))

    def link_events(self) -> list[LinkEvent]:
        return []

    def close(self) -> None:
        return None


class Pair:
    """A primary that writes, and its mirror."""

    def __init__(self) -> None:
        self.memory, self.wire, self.back = memory(), Wire(), Wire()
        wire: Any = self.wire
        back: Any = self.back
        self.sender = MirrorSender(wire, TERM, 5, attempt=1)
        self.mirror = Mirror(ROLE, TERM, memory(), back, LOG)
        self.step = 0

    def write(self, positions: list[int]) -> None:
        self.step += 1
        at, generator = torch.tensor(positions), torch.Generator().manual_seed(self.step)
        for cache in self.memory.caches:
            blocks, offsets = at // KV_BLOCK_TOKENS, at % KV_BLOCK_TOKENS
            cache.keys[blocks, :, :, offsets] = torch.randn(len(at), 2, 4, generator=generator)
            cache.values[blocks, :, offsets] = torch.randn(len(at), 2, 4, generator=generator)
        self.memory.log_hidden(at, torch.randn(len(at), 8, generator=generator))
        self.sender.send_rows(self.memory, at, self.step)

    def fill(self) -> None:
        if self.sender.wants_to_send:
            self.sender.send_blocks(self.memory, self.step)

    def deliver(self) -> None:
        while self.wire.waiting:
            self.mirror.apply(*self.wire.waiting.pop(0))
        while self.back.waiting:
            message, _ = self.back.waiting.pop(0)
            assert isinstance(message, MirrorAck)
            self.sender.acknowledged(message.applied)


POSITIONS = st.lists(st.integers(0, BLOCKS * KV_BLOCK_TOKENS - 1), min_size=1, max_size=4, unique=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(POSITIONS, st.sampled_from(["fill", "deliver"])), max_size=25), st.integers(0, 8))
def test_a_mirror_that_joins_at_any_time_is_equal_once_it_is_complete(events: list[Any], joins_at: int) -> None:
    pair, used = Pair(), set[int]()
    for number, event in enumerate(events):
        if number == joins_at:
            pair.sender.begin(used)
        if event == "fill":
            pair.fill()
        elif event == "deliver":
            pair.deliver()
        else:
            pair.write(event)
            used.update(position // KV_BLOCK_TOKENS for position in event)
        if pair.mirror.is_complete and not pair.wire.waiting:
            assert_equal(pair.memory, pair.mirror.memory)
            assert pair.mirror.mark == pair.step
    if not pair.sender.connected:
        pair.sender.begin(used)
    while pair.sender.wants_to_send:
        pair.fill()
    pair.deliver()
    assert pair.mirror.is_complete
    assert_equal(pair.memory, pair.mirror.memory)
    assert pair.mirror.mark == pair.step


class SlowLink:
    """A mirror that takes a part of what is sent meanwhile, however much is sent."""

    def __init__(self, block_bytes: int, num_blocks: int) -> None:
        self.num_sent = self.num_taken = 0
        self.most_bytes_under_way = 0
        self.block_bytes = block_bytes
        wire: Any = self
        self.sender = MirrorSender(wire, TERM, 5, attempt=1)
        self.sender.begin(range(num_blocks))

    def send(self, message: Message, header: Header) -> None:
        if self.num_sent - self.num_taken >= 1024:
            raise Full("full")
        self.num_sent += 1
        self.most_bytes_under_way = max(self.most_bytes_under_way, self.sender._bytes_outstanding)

    def rows(self, positions: torch.Tensor) -> Rows:
        some = torch.empty(1, len(positions) // KV_BLOCK_TOKENS, self.block_bytes // 8)
        return Rows(some, some, torch.empty(0, 1))

    def back_fill(self, taken_per_turn: float) -> None:
        memory: Any = self
        taken = 0.0
        for _ in range(100_000):
            if self.sender.wants_to_send:
                self.sender.send_blocks(memory, 1)
            elif self.sender._is_filled or self.sender.is_broken:
                return
            taken = min(taken + taken_per_turn, self.num_sent)
            self.num_taken = int(taken)
            self.sender.acknowledged(self.num_taken)
        raise AssertionError("it has no end")


@pytest.mark.parametrize("taken_per_turn", [1.0, 0.9, 0.25, 0.05])
@pytest.mark.parametrize(("block_bytes", "num_blocks"), [(1 << 20, 600), (8, 20_000)], ids=["large", "small"])
def test_a_back_fill_over_a_link_slower_than_copying_waits_for_it_and_ends(
    block_bytes: int, num_blocks: int, taken_per_turn: float
) -> None:
    link = SlowLink(block_bytes, num_blocks)
    link.back_fill(taken_per_turn)
    assert not link.sender.is_broken
    assert link.num_sent == -(-num_blocks // BACKFILL_BLOCKS)
    assert link.most_bytes_under_way <= MAX_BACKFILL_AHEAD_BYTES + BACKFILL_BLOCKS * block_bytes


def test_rows_do_not_wait_for_a_back_fill_and_break_a_mirror_that_lags_by_the_limit() -> None:
    pair = Pair()
    pair.sender.begin(range(BLOCKS))
    pair.sender._bytes_outstanding = MAX_BACKFILL_AHEAD_BYTES + 1
    assert not pair.sender.wants_to_send
    pair.write([1])
    assert len(pair.wire.waiting) == 1
    assert not pair.sender.is_broken
    pair.sender._bytes_outstanding = MAX_UNACKNOWLEDGED_BYTES
    pair.write([1])
    assert pair.sender.is_broken


def test_what_could_not_be_acknowledged_at_once_is_acknowledged_later_since_the_holder_may_wait_for_it() -> None:
    pair = Pair()
    pair.sender.begin(range(BLOCKS))
    pair.fill()
    pair.back.takes = False
    pair.deliver()
    assert not pair.back.waiting
    pair.mirror.look()
    pair.back.takes = True
    for _ in range(2):
        pair.mirror.look()
    ((message, _),) = pair.back.waiting
    assert message == MirrorAck(5, 1)


def test_a_mirror_that_acknowledges_nothing_for_long_is_given_up() -> None:
    pair = Pair()
    pair.sender.begin(range(BLOCKS))
    pair.sender.look(0.0)
    pair.sender.look(2 * MAX_SILENCE_S)
    assert not pair.sender.is_broken, "nothing is under way"
    pair.fill()
    pair.sender.look(200.0)
    pair.sender.look(199.0 + MAX_SILENCE_S)
    assert not pair.sender.is_broken
    pair.deliver()
    pair.fill()
    pair.sender.look(200.0 + MAX_SILENCE_S)
    assert not pair.sender.is_broken, "it has acknowledged something"
    pair.sender.look(200.0 + 2 * MAX_SILENCE_S)
    assert pair.sender.is_broken


def test_a_large_back_fill_goes_in_pieces_and_only_the_last_completes() -> None:
    pair = Pair()
    pair.sender.begin(range(BACKFILL_BLOCKS + 1))
    pair.fill()
    pair.deliver()
    assert not pair.mirror.is_complete
    pair.fill()
    assert not pair.sender.wants_to_send
    pair.deliver()
    assert pair.mirror.is_complete


def test_many_rows_of_a_step_go_in_pieces_and_its_mark_comes_with_the_last() -> None:
    pair = Pair()
    pair.sender.begin([])
    pair.fill()
    pair.write([0])
    pair.deliver()
    pair.write(list(range((2 * BACKFILL_BLOCKS + 1) * KV_BLOCK_TOKENS)))
    sizes, marks = list[int](), list[int]()
    for message, header in pair.wire.waiting:
        assert isinstance(message, MirrorRows)
        sizes.append(message.positions.shape[0] // KV_BLOCK_TOKENS)
        pair.mirror.apply(message, header)
        marks.append(pair.mirror.mark)
    assert sizes == [BACKFILL_BLOCKS, BACKFILL_BLOCKS, 1]
    assert marks == [1, 1, 2]
    assert_equal(pair.mirror.memory, pair.memory)


def test_a_gap_spoils_the_copy_until_the_stream_begins_anew() -> None:
    pair = Pair()
    pair.sender.begin([0])
    pair.fill()
    pair.deliver()
    pair.write([1])
    pair.wire.waiting.clear()
    pair.write([2])
    with capture_logs() as logs:
        pair.deliver()
    assert [entry["reason"] for entry in logs] == ["message 3 of the mirrored stage came when message 2 was due"]
    assert pair.mirror.is_spoilt
    assert not pair.mirror.is_complete
    pair.wire.num_sent = 0
    wire: Any = pair.wire
    pair.sender = MirrorSender(wire, TERM, 5, attempt=2)
    pair.sender.begin([0])
    pair.fill()
    pair.deliver()
    assert pair.mirror.is_complete
    assert_equal(pair.memory, pair.mirror.memory)


@pytest.mark.parametrize(("term", "lease_term"), [(TERM - 1, 5), (TERM, 4)])
def test_a_holder_that_was_replaced_is_not_followed(term: int, lease_term: int) -> None:
    pair, wire = Pair(), Wire()
    given: Any = wire
    stale = MirrorSender(given, term, lease_term, attempt=9)
    stale.begin([])
    stale.send_blocks(pair.memory, 1)
    assert not pair.mirror.follows(*wire.waiting[0])


def test_what_names_a_place_outside_the_memory_is_refused() -> None:
    pair = Pair()
    pair.sender.begin([])
    pair.write([1])
    message, header = pair.wire.waiting[0]
    assert isinstance(message, MirrorRows)
    assert not message.is_last
    pair.mirror.memory = allocate_paged_memory(2, 0 + 1, (2, 4), 8, torch.float32, with_log=True)
    pair.wire.waiting.clear()
    pair.write([40])
    with capture_logs() as logs:
        assert pair.mirror.apply(pair.wire.waiting[0][0], header), "the router hears of it"
    assert "MirrorRows.positions names a place outside" in logs[0]["reason"]
    pair = Pair()
    pair.sender.begin([19])
    pair.fill()
    message, header = pair.wire.waiting[0]
    assert message.is_last
    pair.mirror.memory = allocate_paged_memory(2, 1, (2, 4), 8, torch.float32, with_log=True)
    with capture_logs() as logs:
        assert pair.mirror.apply(message, header), "the router hears of it"
    assert "MirrorRows.positions names a place outside" in logs[0]["reason"]
    assert pair.mirror.is_spoilt


def test_a_mirror_that_does_not_keep_up_is_given_up() -> None:
    pair = Pair()
    pair.sender.begin([])
    pair.wire.takes = False
    pair.write([1])
    assert pair.sender.is_broken
    assert not pair.sender.wants_to_send
