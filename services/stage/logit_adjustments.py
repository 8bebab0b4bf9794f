"""Penalties and biases of a step's sampling rows, as flat columns. Checked here, applied in `model/penalties.py`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.array import Float64Array, Int32Array, Int64Array, frame_to_array
from common.errors import ProtocolError
from common.messages import Step


@dataclass(frozen=True, slots=True)
class LogitAdjustments:
    """S sampling rows, H (row, token) pairs with a past, B (row, token) pairs with a bias; each pair once."""

    min_ps: Float64Array
    """[S]; 0: off."""
    presence_penalties: Float64Array
    """[S]."""
    frequency_penalties: Float64Array
    """[S]."""
    repetition_penalties: Float64Array
    """[S]; 1: off."""
    token_counts: Int32Array
    """[H, 4]: row, token id, times generated, 1 if in the prompt."""
    bias_places: Int64Array
    """[B, 2]: row, token id."""
    biases: Float64Array
    """[B]; -inf: must not be drawn."""


def read_adjustments(step: Step, num_rows: int) -> LogitAdjustments | None:
    """None where no row asks for any. Raises ProtocolError."""
    penalties: Float64Array = frame_to_array(step.penalties, "float64", (None, 5), "Step.penalties")
    counts: Int32Array = frame_to_array(step.token_counts, "int32", (None, 4), "Step.token_counts")
    biases: Float64Array = frame_to_array(step.biases, "float64", (None, 3), "Step.biases")
    if not len(penalties) and not len(counts) and not len(biases):
        return None
    _check_penalties(penalties, num_rows)
    if len(counts) and (counts.min() < 0 or counts[:, 0].max() >= num_rows or counts[:, 3].max() > 1):
        raise ProtocolError(f"Step.token_counts holds a number that is no count, or a row outside [0, {num_rows})")
    if len(biases) and not ((biases[:, :2] >= 0) & (biases[:, :2] < (num_rows, 1 << 31))).all():
        raise ProtocolError(f"Step.biases holds a row outside [0, {num_rows}), or no token id")
    if not (biases[:, 2] < np.inf).all():
        raise ProtocolError("Step.biases holds a bias that is not a number")
    dense = np.tile(np.array([0.0, 0.0, 0.0, 1.0]), (num_rows, 1))
    dense[penalties[:, 0].astype(np.int64)] = penalties[:, 1:]
    return LogitAdjustments(
        min_ps=dense[:, 0],
        presence_penalties=dense[:, 1],
        frequency_penalties=dense[:, 2],
        repetition_penalties=dense[:, 3],
        token_counts=counts,
        bias_places=biases[:, :2].astype(np.int64),
        biases=biases[:, 2],
    )


def _check_penalties(penalties: Float64Array, num_rows: int) -> None:
    if not np.isfinite(penalties).all():
        raise ProtocolError("Step.penalties holds a number that is not finite")
    rows, min_ps, repetitions = penalties[:, 0], penalties[:, 1], penalties[:, 4]
    if not ((rows >= 0) & (rows < num_rows)).all():
        raise ProtocolError(f"Step.penalties holds a row outside [0, {num_rows})")
    if not ((min_ps >= 0) & (min_ps <= 1) & (repetitions > 0)).all():
        raise ProtocolError("Step.penalties holds a min_p outside [0, 1], or a repetition penalty that is not above 0")
