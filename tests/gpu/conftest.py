"""All tests here need a CUDA device, and are skipped where torch finds none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from common.compute.cuda import CudaDevice, open_device
from tests.support.checkpoints.shelf import Shelf


@pytest.fixture(autouse=True, scope="session")
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU")


@pytest.fixture(scope="session")
def gpu(_needs_a_gpu: None) -> CudaDevice:
    device = open_device("cuda")
    assert isinstance(device, CudaDevice)
    return device


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Shelf(tmp_path_factory.mktemp("checkpoints"))
    torch.set_num_threads(threads)
