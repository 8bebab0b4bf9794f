"""The word that peers compare before they trust each other's bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from common.compute.cuda import CudaDevice
from common.compute.device import HOST


def test_it_names_all_that_decides_the_bits_in_one_word() -> None:
    word = HOST.numeric_class("x86-64-v4")
    assert word.startswith("cpu/x86-64-v4/")
    assert word.endswith(torch.__version__)
    assert " " not in word
    assert word == HOST.numeric_class("x86-64-v4")


def test_other_kernels_are_another_class() -> None:
    assert HOST.numeric_class("x86-64-v3") != HOST.numeric_class("torch")


def test_the_class_of_a_gpu_names_it_with_torch_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def class_of(
        variant: str, name: str, capability: tuple[int, int], num_processors: int, build: str, cuda: str
    ) -> str:
        major, minor = capability
        found = SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=num_processors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: found)
        monkeypatch.setattr(torch, "__version__", build)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        gpu = object.__new__(CudaDevice)  # without one: what it says of itself is the driver's
        gpu.place = torch.device("cuda:0")
        return gpu.numeric_class(variant)

    h100 = ("torch", "NVIDIA H100 80GB HBM3", (9, 0), 132, "2.13.0+cu130", "13.0")
    word = class_of(*h100)
    assert word == "cuda/torch/NVIDIA-H100-80GB-HBM3/sm90x132/2.13.0+cu130/cuda13.0"
    others = [
        ("torch+parts2", *h100[1:]),
        ("torch", "NVIDIA A100", *h100[2:]),
        (*h100[:3], 66, *h100[4:]),
        (*h100[:4], "2.14.0", "13.0"),
        (*h100[:5], "12.8"),
    ]
    assert len({word, HOST.numeric_class("torch"), *(class_of(*other) for other in others)}) == 7
