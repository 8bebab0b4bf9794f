"""Which sequences are marked for having gone on without an expert, and what stands for the classes that compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import ProtocolError
from common.messages import FIRST_CLASS, NO_ARRAY, Step
from common.wire.array import array_to_frame
from services.stage.model.micro_batch import BlockTables, MicroBatch, read_micro_batch
from services.stage.step_output import class_number, degraded_sequences, flags_frame


def batch() -> tuple[Step, MicroBatch]:
    """Two sequences: three tokens, then one."""
    step = Step(
        array_to_frame(np.zeros(4, dtype=np.int32)),
        array_to_frame(np.array([(7, 0, 3, 0, 1, 0), (8, 0, 1, 0, 1, 1)], dtype=np.int64)),
        array_to_frame(np.array([0, 1], dtype=np.int32)),
        array_to_frame(np.zeros(0, dtype=np.int64)),
        array_to_frame(np.array([(0.0, 1.0, 0.0, -1.0)])),
        array_to_frame(np.array([(1, 0)], dtype=np.int64)),
    )
    return step, read_micro_batch(step, torch.zeros(4, dtype=torch.int64), BlockTables(4, 8))


def test_a_row_marks_its_sequence() -> None:
    step, flat = batch()
    assert degraded_sequences(step, flat, {2}).tolist() == [True, False]
    assert degraded_sequences(step, flat, {3, 1}).tolist() == [True, True]
    assert degraded_sequences(step, flat, ()).tolist() == [False, False]


def test_what_a_stage_before_says_is_kept() -> None:
    step, flat = batch()
    step = replace(step, degraded=flags_frame(np.array([False, True])))
    assert degraded_sequences(step, flat, ()).tolist() == [False, True]
    assert degraded_sequences(step, flat, {0}).tolist() == [True, True]


def test_no_flags_travel_where_nothing_is_degraded() -> None:
    assert flags_frame(np.array([False, False])) == NO_ARRAY


def test_flags_of_another_number_than_sequences_are_refused() -> None:
    step, flat = batch()
    with pytest.raises(ProtocolError, match="degraded"):
        degraded_sequences(replace(step, degraded=flags_frame(np.array([True]))), flat, ())


def test_a_number_stands_for_the_classes_of_all_stages_in_their_order() -> None:
    def through(*stages: tuple[str, ...]) -> int:
        number = FIRST_CLASS
        for classes in stages:
            number = class_number(number, classes)
        return number

    one, other = ("a", "x"), ("b", "x")
    numbers = [through(one), through(other), through(one, other), through(other, one), through(("a", "x", "x"))]
    assert len(set(numbers)) == len(numbers)
    assert all(0 < number < 1 << 63 for number in numbers)
    assert through(one, other) == through(("a", "x"), ("b", "x"))
    assert class_number(0, one) == 0, "rows of several classes stay so"
