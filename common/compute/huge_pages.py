"""Memory in pages of 2 MiB, where the kernel gives them, for what is read over and over: weights, K and V.

A table of small pages is itself larger than a processor's caches, and prefetching ends at each page. The system says
whether there are such pages (/sys/kernel/mm/transparent_hugepage/enabled: `madvise`, which is usual, or `always`).
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 * 2**20


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns a tensor of no particular values. What is less than a page of it, and what is over, lies in small pages:
    it takes no more memory than any other tensor. Raises RuntimeError for want of memory, as torch does."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # or too many mappings: each of these makes two more, and others of torch's may join
        return torch.empty(shape, dtype=dtype)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    start = -everything.data_ptr() % HUGE_PAGE_BYTES
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
    return everything[start : start + size].view(dtype).view(shape)


def zeros_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns a tensor of zeros, of which all memory is there: what does not fit is known now, not in mid-answer."""
    return empty_in_huge_pages(shape, dtype).zero_()
