from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.scheduling.blocks.block_allocator import BlockAllocator


def test_lowest_free_blocks_go_first() -> None:
    allocator = BlockAllocator(6)
    assert allocator.allocate(4) == (0, 1, 2, 3)
    allocator.free([2, 0])
    assert allocator.allocate(3) == (0, 2, 4)


def test_allocation_is_all_or_nothing() -> None:
    allocator = BlockAllocator(3)
    assert allocator.allocate(4) is None
    assert allocator.num_free == 3
    assert allocator.allocate(0) == ()


def test_shared_block_is_free_after_its_last_holder() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(1)
    assert blocks is not None
    allocator.share(blocks)
    allocator.free(blocks)
    assert allocator.num_free == 1
    allocator.free(blocks)
    assert allocator.num_free == 2


def test_double_free_raises() -> None:
    allocator = BlockAllocator(2)
    allocator.allocate(1)
    allocator.free([0])
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free([0])


def test_free_block_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="cannot be shared"):
        BlockAllocator(1).share([0])


@pytest.mark.parametrize("block_id", [-1, 2])
def test_block_outside_the_pool_raises(block_id: int) -> None:
    with pytest.raises(ValueError, match="outside the pool"):
        BlockAllocator(2).free([block_id])


@given(st.lists(st.one_of(st.integers(0, 5), st.just("free"), st.just("share")), max_size=60))
def test_no_block_is_leaked_or_given_out_twice(operations: list[int | str]) -> None:
    allocator = BlockAllocator(12)
    held: list[int] = []
    for operation in operations:
        if operation == "free" and held:
            allocator.free([held.pop(0)])
        elif operation == "share" and held:
            allocator.share([held[0]])
            held.append(held[0])
        elif isinstance(operation, int):
            blocks = allocator.allocate(operation)
            assert (blocks is None) == (operation > 12 - len(set(held)))
            if blocks is not None:
                assert not set(blocks) & set(held)
                held += blocks
        allocator.check_invariants()
        assert allocator.num_free == 12 - len(set(held))
