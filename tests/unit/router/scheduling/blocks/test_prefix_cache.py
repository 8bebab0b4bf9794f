"""Keys of blocks, the table of cached ones, and what the allocator makes of them."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.scheduling.blocks.block_allocator import BlockAllocator
from services.router.scheduling.blocks.key_chain import KeyChain, child_key, root_key
from services.router.scheduling.blocks.prefix_cache import PrefixCounters

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4)


def chain_of(tokens: list[int], salt: str = "", numeric_class: int = 1) -> list[bytes]:
    chain = KeyChain(salt, 4)
    return [
        chain.key(index, numeric_class, lambda start, stop: tokens[start:stop]) for index in range(len(tokens) // 4)
    ]


def test_a_key_is_sha256_over_the_parent_and_the_tokens() -> None:
    root = hashlib.sha256(struct.pack("<q", 5) + b"salt").digest()
    assert root_key("salt", 5) == root
    assert child_key(root, [1, 2, 3, 70000]) == hashlib.sha256(root + struct.pack("<4i", 1, 2, 3, 70000)).digest()
    assert chain_of([1, 2, 3, 70000], "salt", 5) == [child_key(root, [1, 2, 3, 70000])]


@given(TOKENS, TOKENS, st.text(max_size=3), st.text(max_size=3), st.integers(1, 3), st.integers(1, 3))
def test_keys_are_equal_only_for_equal_beginnings_salts_and_classes(
    one: list[int], other: list[int], salt: str, other_salt: str, numeric_class: int, other_class: int
) -> None:
    mine, theirs = chain_of(one + other, salt, numeric_class), chain_of(other + other, other_salt, other_class)
    assert (mine[0] == theirs[0]) == ((one, salt, numeric_class) == (other, other_salt, other_class))
    assert (mine[1] == theirs[1]) == (mine[0] == theirs[0])


def cached(allocator: BlockAllocator, keys: list[bytes], step: int = 1) -> tuple[int, ...]:
    """Blocks that hold these, and that somebody holds."""
    block_ids = allocator.allocate(len(keys))
    assert block_ids is not None
    for key, block_id in zip(keys, block_ids, strict=True):
        allocator.cache.add(key, block_id, step)
    return block_ids


def test_a_cached_block_that_nobody_holds_counts_as_free_and_goes_last_by_its_last_use() -> None:
    counters = PrefixCounters()
    allocator = BlockAllocator(5, counters)
    first, second = cached(allocator, [b"a", b"b"]), cached(allocator, [b"c"])
    allocator.free(reversed(first))  # the end of a chain before its beginning
    allocator.free(second)
    assert allocator.num_free == 5
    assert allocator.allocate(2) == (3, 4), "those that hold nothing"
    assert allocator.allocate(1) == (1,)
    assert [allocator.cache.find(key) for key in (b"a", b"b", b"c")] == [0, None, 2]
    allocator.share([0])
    assert allocator.allocate(2) is None
    assert allocator.allocate(1) == (2,)
    assert counters.blocks_evicted == 2
    allocator.check_invariants()


def test_one_that_finds_a_block_keeps_it_from_being_given_away() -> None:
    allocator = BlockAllocator(2)
    (block_id,) = cached(allocator, [b"a"])
    allocator.free([block_id])
    allocator.share([block_id])
    allocator.share([block_id])
    assert allocator.reference_count(block_id) == 2
    assert allocator.allocate(2) is None
    allocator.free([block_id, block_id])
    allocator.check_invariants()
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free([block_id])


def test_two_that_computed_the_same_leave_one_entry() -> None:
    allocator = BlockAllocator(4)
    (first,) = cached(allocator, [b"a"])
    (second,) = cached(allocator, [b"a"])
    assert allocator.cache.find(b"a") == first
    allocator.free([second])
    assert allocator.cache.num_idle == 0, "it holds nothing that could be found"
    allocator.check_invariants()


def test_what_a_holder_lacks_by_its_mark_is_forgotten_and_free() -> None:
    allocator = BlockAllocator(4)
    old, new = cached(allocator, [b"a"], step=3), cached(allocator, [b"b", b"c"], step=7)
    allocator.free([*old, new[0]])
    assert sorted(allocator.cache.behind([9, 6])) == list(new)
    allocator.forget(allocator.cache.behind([9, 6]))
    assert [allocator.cache.find(key) for key in (b"a", b"b", b"c")] == [old[0], None, None]
    assert allocator.num_free == 3
    allocator.check_invariants()


def test_a_spoilt_block_is_not_found_until_it_holds_something_else() -> None:
    allocator = BlockAllocator(2)
    blocks = cached(allocator, [b"a"])
    allocator.cache.spoil(blocks)
    assert allocator.cache.find(b"a") is None
    assert allocator.cache.is_spoilt([1, *blocks])
    allocator.free(blocks)
    assert not allocator.cache.is_spoilt(blocks)
    assert cached(allocator, [b"a"]) == blocks
    allocator.check_invariants()
