"""What a step says of penalties and biases, row by row of its sampling sequences. Pure: numpy only.

The last stage keeps them, and counts tokens on by itself: a row is told anew only where it cannot know (see
`Request.tells_adjustments`). A client's thousand biases travel once, not with each of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.wire.array import Float64Array, Int32Array, Int64Array
from services.router.scheduling.step_plan import ScheduledChunk


def adjusted_rows(sampled: Sequence[ScheduledChunk]) -> Int64Array:
    """`Step.adjusted`: int64 [*, 3], of the chunks that sample."""
    rows = [
        (row, chunk.num_generated, int(chunk.tells_adjustments))
        for row, chunk in enumerate(sampled)
        if chunk.sampling.adjusts(chunk.num_generated)
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def penalty_rows(sampled: Sequence[ScheduledChunk]) -> Float64Array:
    """`Step.penalties`: float64 [*, 5]."""
    rows = [
        (row, sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
        for row, chunk in enumerate(sampled)
        if chunk.tells_adjustments and ((sampling := chunk.sampling).min_p or sampling.counts_tokens)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


def count_rows(sampled: Sequence[ScheduledChunk]) -> Int32Array:
    """`Step.token_counts`: int32 [*, 4]."""
    parts = []
    for row, chunk in enumerate(sampled):
        if chunk.tells_adjustments and chunk.token_counts:
            counts = np.frombuffer(chunk.token_counts, dtype=np.int32).reshape(-1, 3)
            parts.append(np.insert(counts, 0, row, axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 4), dtype=np.int32)


def bias_rows(sampled: Sequence[ScheduledChunk]) -> Float64Array:
    """`Step.biases`: float64 [*, 3]; while a choice is too short to end, its stop tokens stand there with -inf."""
    parts = []
    for row, chunk in enumerate(sampled):
        sampling = chunk.sampling
        is_early = sampling.is_early(chunk.num_generated)
        if chunk.tells_adjustments and (is_early or sampling.logit_bias):
            table = sampling.early_bias_table if is_early else sampling.bias_table
            parts.append(np.insert(table, 0, row, axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 3), dtype=np.float64)
