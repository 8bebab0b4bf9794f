"""What a step says of penalties and biases, row by row of its sampling sequences. Pure: numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.array import Float64Array, Int32Array
from services.router.scheduling.step_plan import ScheduledChunk


def penalty_rows(sampled: Sequence[ScheduledChunk]) -> Float64Array:
    """`Step.penalties`: float64 [*, 5], of the chunks that sample."""
    rows = [
        (row, sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
        for row, sampling in enumerate(chunk.sampling for chunk in sampled)
        if sampling.min_p or sampling.counts_tokens
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


def count_rows(sampled: Sequence[ScheduledChunk]) -> Int32Array:
    """`Step.token_counts`: int32 [*, 4]."""
    parts = []
    for row, chunk in enumerate(sampled):
        if chunk.token_counts:
            counts = np.frombuffer(chunk.token_counts, dtype=np.int32).reshape(-1, 3)
            parts.append(np.insert(counts, 0, row, axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 4), dtype=np.int32)


def bias_rows(sampled: Sequence[ScheduledChunk]) -> Float64Array:
    """`Step.biases`: float64 [*, 3]; while a choice is too short to end, its stop tokens stand there with -inf."""
    parts = []
    for row, chunk in enumerate(sampled):
        sampling = chunk.sampling
        is_too_short = chunk.num_generated < sampling.min_tokens
        if is_too_short or sampling.logit_bias:
            table = sampling.early_bias_table if is_too_short else sampling.bias_table
            parts.append(np.insert(table, 0, row, axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 3), dtype=np.float64)
