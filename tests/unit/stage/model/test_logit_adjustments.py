"""Penalties and biases of a step, read and checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.messages import Step, TensorFrame
from common.wire.array import array_to_frame
from services.router.scheduling.request import count_tokens
from services.stage.model.logit_adjustments import (
    CountedTokens,
    KeptAdjustments,
    LogitAdjustments,
    adjusted_logits,
    without_unlikely,
)

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
        adjusted=frame([(row, 0, 1) for row in range(rows)], "int64", 3),
    )
    return KeptAdjustments().apply(step, np.arange(rows))


def test_rows_that_say_nothing_have_neutral_columns() -> None:
    made = read([(1, 0.1, 0.5, -0.5, 1.2)], [(1, 7, 2, 0)], [(0, 3, -INF)])
    assert made is not None
    assert made.min_ps.tolist() == [0.0, 0.1]
    assert made.presence_penalties.tolist() == [0.0, 0.5]
    assert made.frequency_penalties.tolist() == [0.0, -0.5]
    assert made.repetition_penalties.tolist() == [1.0, 1.2]
    assert (made.token_counts.tolist(), made.bias_places.tolist()) == ([[1, 7, 2, 0]], [[0, 3]])


def step_of(*, adjusted: list[tuple[int, ...]], biases: list[tuple[float, ...]] = [], released: list[int] = []) -> Step:  # noqa: B006
    return Step(
        *(EMPTY, EMPTY, EMPTY),
        array_to_frame(np.array(released, dtype=np.int64)),
        *(EMPTY, EMPTY),
        biases=array_to_frame(np.array(biases, dtype=np.float64).reshape(-1, 3)),
        adjusted=array_to_frame(np.array(adjusted, dtype=np.int64).reshape(-1, 3)),
    )


def test_a_step_without_any_has_none() -> None:
    assert KeptAdjustments().apply(step_of(adjusted=[]), np.arange(2)) is None


def test_what_was_told_once_is_gone_on_with_until_the_sequence_is_released() -> None:
    kept = KeptAdjustments()
    kept.apply(step_of(adjusted=[(0, 2, 1)], biases=[(0, 3, 1.5)]), np.array([7]))
    kept.count([7, 8], [3, 3])
    again = kept.apply(step_of(adjusted=[(1, 3, 0)]), np.array([9, 7]))
    assert again is not None
    assert (again.bias_places.tolist(), again.biases.tolist()) == ([[1, 3]], [1.5])
    with pytest.raises(ProtocolError, match="sequence 7, which is not known here"):
        kept.apply(step_of(adjusted=[(0, 3, 0)], released=[7]), np.array([7]))
    assert len(kept) == 0


@pytest.mark.parametrize("num_generated", [2, 4])
def test_a_sequence_that_has_another_number_of_tokens_than_were_counted_is_refused(num_generated: int) -> None:
    kept = KeptAdjustments()
    kept.apply(step_of(adjusted=[(0, 2, 1)], biases=[(0, 3, 1.5)]), np.array([7]))
    kept.count([7], [3])
    with pytest.raises(ProtocolError, match=f"sequence 7 has {num_generated} tokens, 3 were counted here"):
        kept.apply(step_of(adjusted=[(0, num_generated, 0)]), np.array([7]))


@pytest.mark.parametrize(
    ("adjusted", "biases"),
    [
        ([(2, 0, 1)], []),
        ([(-1, 0, 1)], []),
        ([(0, -1, 1)], []),
        ([(0, 0, 2)], []),
        ([(0, 0, 1), (0, 0, 1)], []),
        ([], [(0, 3, 1.5)]),
        ([(1, 0, 1)], [(0, 3, 1.5)]),
    ],
)
def test_rows_that_are_not_told_right_are_refused(adjusted: Any, biases: Any) -> None:
    with pytest.raises(ProtocolError, match=r"Step\.(adjusted|biases)"):
        KeptAdjustments().apply(step_of(adjusted=adjusted, biases=biases), np.array([7, 8]))


@given(st.lists(st.integers(0, 300), max_size=300), st.lists(st.integers(0, 300), max_size=300))
def test_tokens_counted_on_are_those_counted_anew(told: list[int], sampled: list[int]) -> None:
    rows = np.frombuffer(count_tokens([5, 6], told), dtype=np.int32).reshape(-1, 3)
    counted = CountedTokens(rows)
    for token_id in sampled:
        counted.add(token_id)
    anew = np.frombuffer(count_tokens([5, 6], told + sampled), dtype=np.int32).reshape(-1, 3)
    assert sorted(counted.rows.tolist()) == anew.tolist()


@given(
    told=st.lists(st.integers(0, 9), max_size=12),
    drafts=st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=2, max_size=2),
)
def test_a_row_behind_drafts_is_adjusted_as_if_they_had_been_sampled_and_they_are_not_counted(
    told: list[int], drafts: list[list[int]]
) -> None:
    """Two sequences: of the first one tokens are counted, the other one has a bias."""

    def kept_after(token_ids: list[int]) -> KeptAdjustments:
        kept = KeptAdjustments()
        counts = np.frombuffer(count_tokens([5], told), dtype=np.int32).reshape(-1, 3)
        penalties = np.array([(0, 0.1, 0.5, 0.25, 1.2)])
        anew = replace(
            step_of(adjusted=[(0, len(told), 1), (1, 3, 1)], biases=[(1, 4, 2.0)]),
            penalties=array_to_frame(penalties),
            token_counts=array_to_frame(np.insert(counts, 0, 0, axis=1)),
        )
        kept.apply(anew, np.array([7, 8]))
        kept.count([7] * len(token_ids), token_ids)
        return kept

    step = step_of(adjusted=[(0, len(told), 0), (1, 3, 0)])
    kept = kept_after([])
    made = kept.apply(step, np.array([7, 8]), [np.array(own, dtype=np.int32) for own in drafts])
    assert made is not None
    for number in range(len(drafts[0]) + 1):
        behind = drafts[0][:number]
        alone = kept_after(behind).apply(step_of(adjusted=[(0, len(told) + number, 0)]), np.array([7]))
        assert alone is not None
        own = made.token_counts[made.token_counts[:, 0] == number, 1:]
        assert sorted(own.tolist()) == sorted(alone.token_counts[:, 1:].tolist())
    num_first, num_rows = len(drafts[0]) + 1, len(drafts[0]) + len(drafts[1]) + 2
    assert made.bias_places.tolist() == [[row, 4] for row in range(num_first, num_rows)]
    assert made.repetition_penalties.tolist() == [1.2] * num_first + [1.0] * (num_rows - num_first)
    again = kept.apply(step, np.array([7, 8]))
    assert again is not None, "the drafts have not been counted"
    assert sorted(again.token_counts[:, 1:].tolist()) == sorted(
        np.frombuffer(count_tokens([5], told), dtype=np.int32).reshape(-1, 3).tolist()
    )


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
