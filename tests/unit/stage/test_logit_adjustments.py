"""Penalties and biases of a step, read and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.array import array_to_frame
from common.errors import ProtocolError
from common.messages import Step, TensorFrame
from services.stage.logit_adjustments import LogitAdjustments, read_adjustments
from services.stage.model.penalties import adjusted_logits, without_unlikely

EMPTY = TensorFrame("int64", (0,), b"")
NAN, INF = float("nan"), float("inf")


def read(
    penalties: list[tuple[float, ...]], counts: list[tuple[int, ...]], biases: list[tuple[float, ...]], rows: int = 2
) -> LogitAdjustments | None:
    def frame(values: list[Any], dtype: str, width: int) -> TensorFrame:
        return array_to_frame(np.array(values, dtype=dtype).reshape(-1, width))

    step = Step(
        *(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY),
        penalties=frame(penalties, "float64", 5),
        token_counts=frame(counts, "int32", 4),
        biases=frame(biases, "float64", 3),
    )
    return read_adjustments(step, rows)


def test_rows_that_say_nothing_have_neutral_columns() -> None:
    made = read([(1, 0.1, 0.5, -0.5, 1.2)], [(1, 7, 2, 0)], [(0, 3, -INF)])
    assert made is not None
    assert made.min_ps.tolist() == [0.0, 0.1]
    assert made.presence_penalties.tolist() == [0.0, 0.5]
    assert made.frequency_penalties.tolist() == [0.0, -0.5]
    assert made.repetition_penalties.tolist() == [1.0, 1.2]
    assert (made.token_counts.tolist(), made.bias_places.tolist()) == ([[1, 7, 2, 0]], [[0, 3]])


def test_a_step_without_any_has_none() -> None:
    assert read([], [], []) is None


@pytest.mark.parametrize(
    ("penalties", "counts", "biases", "named"),
    [
        ([(2, 0, 0, 0, 1)], [], [], r"Step\.penalties .* outside \[0, 2\)"),
        ([(-1, 0, 0, 0, 1)], [], [], r"Step\.penalties"),
        ([(0, 0, NAN, 0, 1)], [], [], r"Step\.penalties"),
        ([(0, 0, 0, INF, 1)], [], [], r"Step\.penalties"),
        ([(0, 1.5, 0, 0, 1)], [], [], r"Step\.penalties .* min_p"),
        ([(0, 0, 0, 0, 0)], [], [], r"Step\.penalties"),
        ([], [(2, 0, 1, 0)], [], r"Step\.token_counts"),
        ([], [(0, -1, 1, 0)], [], r"Step\.token_counts"),
        ([], [(0, 1, -1, 0)], [], r"Step\.token_counts"),
        ([], [(0, 1, 1, 2)], [], r"Step\.token_counts"),
        ([], [], [(2, 0, 1.0)], r"Step\.biases"),
        ([], [], [(0, -1, 1.0)], r"Step\.biases"),
        ([], [], [(0, 1e300, 1.0)], r"Step\.biases"),
        ([], [], [(NAN, 0, 1.0)], r"Step\.biases"),
        ([], [], [(0, 0, NAN)], r"Step\.biases"),
        ([], [], [(0, 0, INF)], r"Step\.biases"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(penalties: Any, counts: Any, biases: Any, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        read(penalties, counts, biases)


NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, NAN, INF, -INF]) | st.floats(-3, 3)
WHOLE = st.sampled_from([-1, 0, 1, 2, 5, 9, 2**31 - 1])


@settings(max_examples=200, deadline=None)
@given(
    penalties=st.lists(st.tuples(WHOLE, *[NUMBERS] * 4), max_size=3),
    counts=st.lists(st.tuples(WHOLE, WHOLE, WHOLE, WHOLE), max_size=3),
    biases=st.lists(st.tuples(NUMBERS, WHOLE, NUMBERS), max_size=3),
)
def test_any_numbers_are_logits_without_nan_or_a_protocol_error(penalties: Any, counts: Any, biases: Any) -> None:
    try:
        made = read(penalties, counts, biases)
    except ProtocolError:
        return
    if made is not None:
        logits = torch.tensor([[0.0, 3.0, -3.0, 1e4, -1e4, 1.0]] * 2)
        adjusted = without_unlikely(adjusted_logits(logits, made), made.min_ps)
        assert not torch.isnan(adjusted).any()
        assert (adjusted < INF).all()


@pytest.mark.parametrize("penalties", [[(0, 0.0, 0.0, 1e300, 1.0)], [(0, 0.0, 1e300, 0.0, 1.0)], []])
def test_no_peers_number_makes_a_logit_that_is_none(penalties: Any) -> None:
    made = read(penalties, [(0, 1, 0, 1)], [(0, 0, 1e300), (0, 2, -1e300)])
    assert made is not None
    adjusted = adjusted_logits(torch.zeros(2, 6), made)
    assert not torch.isnan(adjusted).any()
    assert adjusted[0, 0] == adjusted.max() < INF
    assert adjusted[0, 2] == -INF
