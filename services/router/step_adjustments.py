"""What a step says of penalties and biases, row by row of its sampling sequences. Pure: numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from common.array import Float64Array, Int32Array
from services.router.scheduling.step_plan import ScheduledChunk

MAX_TOKEN_ID = 2**31


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
        too_short = chunk.num_generated < sampling.min_tokens
        if sampling.logit_bias or too_short:
            biases = _biases(sampling.logit_bias, sampling.stop_token_ids if too_short else frozenset())
            parts.append(np.insert(biases, 0, row, axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 3))


@lru_cache(maxsize=1024)
def _biases(logit_bias: tuple[tuple[int, float], ...], forbidden: frozenset[int]) -> Float64Array:
    """float64 [*, 2]: token id, bias. The same for every step of a choice."""
    biases = dict(logit_bias)
    # A client may name ids that no vocabulary has, and that no column could carry.
    biases.update({token_id: -np.inf for token_id in sorted(forbidden) if token_id < MAX_TOKEN_ID})
    return np.array(list(biases.items()), dtype=np.float64).reshape(-1, 2)
