import mmap
import sys

import pytest
import torch

from common.compute.huge_pages import HUGE_PAGE_BYTES, empty_in_huge_pages, zeros_in_huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has madvise for them")


def mappings(address: int) -> tuple[int, set[str]]:
    """Returns size in bytes and flags of the mapping that has this address."""
    is_ours, size = False, 0
    with open("/proc/self/smaps") as lines:
        for line in lines:
            key = line.split()[0]
            if "-" in key:
                first, last = (int(bound, 16) for bound in key.split("-"))
                is_ours, size = first <= address < last, last - first
            elif is_ours and key == "VmFlags:":
                return size, set(line.split()[1:])
    raise AssertionError(f"{address:x} is in no mapping")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fills_pages_begins_at_one_and_asks_for_them(dtype: torch.dtype) -> None:
    tensor = empty_in_huge_pages((5, HUGE_PAGE_BYTES // 2 - 3), dtype)
    assert tensor.shape == (5, HUGE_PAGE_BYTES // 2 - 3)
    assert tensor.dtype == dtype
    assert tensor.data_ptr() % HUGE_PAGE_BYTES == 0
    size, flags = mappings(tensor.data_ptr())
    assert "hg" in flags
    assert size == tensor.nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES


def test_what_is_over_lies_in_small_pages() -> None:
    tensor = empty_in_huge_pages((HUGE_PAGE_BYTES + 4096,), torch.uint8)
    assert "hg" not in mappings(tensor.data_ptr() + tensor.nbytes - 1)[1]


def test_all_values_can_be_written_and_read() -> None:
    tensor = empty_in_huge_pages((3 * HUGE_PAGE_BYTES + 5,), torch.uint8)
    tensor[:] = 7
    assert int(tensor.to(torch.int64).sum()) == 7 * tensor.numel()


def test_the_memory_of_zeros_is_there_at_once() -> None:
    def resident_bytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident_bytes()
    tensor = zeros_in_huge_pages((64, HUGE_PAGE_BYTES), torch.uint8)
    assert resident_bytes() - before >= tensor.nbytes * 0.95
    assert not tensor.any()
    del tensor
    assert resident_bytes() - before < HUGE_PAGE_BYTES * 32


def test_a_tensor_that_fits_nowhere_is_refused_as_by_torch() -> None:
    with pytest.raises(RuntimeError, match="memory"):
        empty_in_huge_pages((2**60,), torch.uint8)


def test_a_process_that_may_have_no_more_mappings_does_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert zeros_in_huge_pages((4, HUGE_PAGE_BYTES), torch.uint8).shape == (4, HUGE_PAGE_BYTES)
