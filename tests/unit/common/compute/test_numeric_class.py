"""The word that peers compare before they trust each other's bits."""

from __future__ import annotations

import torch

from common.compute.numeric_class import cuda_numeric_class, numeric_class


def test_it_names_all_that_decides_the_bits_in_one_word() -> None:
    word = numeric_class("cpu", "x86-64-v4")
    assert word.startswith("cpu/x86-64-v4/")
    assert word.endswith(torch.__version__)
    assert " " not in word
    assert word == numeric_class("cpu", "x86-64-v4")


def test_other_kernels_are_another_class() -> None:
    assert numeric_class("cpu", "x86-64-v3") != numeric_class("cpu", "torch")


def test_the_class_of_a_gpu_names_it_with_torch_and_cuda() -> None:
    h100 = ("torch", "NVIDIA H100 80GB HBM3", (9, 0), 132, "2.13.0+cu130", "13.0")
    word = cuda_numeric_class(*h100)
    assert word == "cuda/torch/NVIDIA-H100-80GB-HBM3/sm90x132/2.13.0+cu130/cuda13.0"
    others = [
        ("torch+parts2", *h100[1:]),
        ("torch", "NVIDIA A100", *h100[2:]),
        (*h100[:3], 66, *h100[4:]),
        (*h100[:4], "2.14.0", "13.0"),
        (*h100[:5], "12.8"),
    ]
    assert len({word, numeric_class("cpu", "torch"), *(cuda_numeric_class(*other) for other in others)}) == 7
