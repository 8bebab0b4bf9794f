"""The two ways to compute that every kernel test goes through: the native kernels, and torch where they are absent."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from common.compute.native_library import NativeKernels, load_native_kernels

KERNEL_CHOICES = ("native", "torch")


@cache
def _native_kernels(threads: int) -> NativeKernels | None:
    return load_native_kernels(threads=threads)


def kernels_for(choice: str, threads: int = 1) -> NativeKernels | None:
    """The kernels that a name of KERNEL_CHOICES stands for; skips the test where there is no compiler."""
    if choice == "torch":
        return None
    kernels = _native_kernels(threads)
    if kernels is None:
        pytest.skip("no C++ compiler and no prebuilt kernels")
    return kernels


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Imported where wanted. Many tiny torch calls on more threads than idle cores would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
