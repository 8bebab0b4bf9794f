"""The word that peers compare before they trust each other's bits."""

from __future__ import annotations

import torch

from common.numeric_class import numeric_class


def test_it_names_all_that_decides_the_bits_in_one_word() -> None:
    word = numeric_class("cpu", "x86-64-v4")
    assert word.startswith("cpu/x86-64-v4/")
    assert word.endswith(torch.__version__)
    assert " " not in word
    assert word == numeric_class("cpu", "x86-64-v4")


def test_other_kernels_are_another_class() -> None:
    assert numeric_class("cpu", "x86-64-v3") != numeric_class("cpu", "torch")
