"""Choosing tokens, for all rows of a step at once.

Gumbel-max (Maddison et al., arXiv 1411.0030): argmax of logits / temperature + noise. The noise of (request seed,
choice, position, token id) comes from a counter-based generator (SplitMix64, Steele et al. 2014), so that a row's token
does not depend on its batch mates, and a replayed request draws the same tokens. Penalties, biases and min_p shape what
is drawn (`penalties.py`); log-probabilities are of the model's own distribution, before all of that.

S rows, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.stage.model.logit_adjustments import adjusted_logits, without_unlikely
from services.stage.model.micro_batch import SamplingColumns

MIN_TEMPERATURE = 1e-30
"""Practically greedy; less would make the logits infinite, and of infinite ones none is the best."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
Uint64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What was chosen. P is the largest number of top logprobs that a row asked for (the rest is filler)."""

    token_ids: Tensor
    """int32 [S]."""
    logprobs: Tensor
    """float32 [S], of the model's own distribution; 0 where not asked for."""
    top_token_ids: Tensor
    """int32 [S, P]."""
    top_logprobs: Tensor
    """float32 [S, P]."""


def sample(logits: Tensor, columns: SamplingColumns) -> SampledTokens:
    """logits [S, V] of any float dtype -> one token a row, as its columns ask for."""
    logits = logits.to(torch.float32)
    adjusted = logits if columns.adjustments is None else adjusted_logits(logits, columns.adjustments)
    tokens = torch.argmax(adjusted, dim=-1)
    drawn = np.flatnonzero(columns.temperatures > 0)
    if drawn.size:
        tokens[torch.from_numpy(drawn)] = _draw(adjusted, columns, drawn)
    asked = np.flatnonzero(columns.num_top_logprobs >= 0)
    num_top = int(columns.num_top_logprobs.max(initial=0))
    logprobs = torch.zeros(len(tokens))
    top_token_ids = torch.zeros((len(tokens), num_top), dtype=torch.int32)
    top_logprobs = torch.zeros((len(tokens), num_top))
    if asked.size:
        rows = torch.from_numpy(asked)
        all_logprobs = torch.log_softmax(logits[rows], dim=-1)
        logprobs[rows] = all_logprobs.gather(1, tokens[rows, None])[:, 0]
        if num_top:
            width = min(num_top, logits.shape[1])
            values, indices = torch.topk(all_logprobs, width, dim=-1)
            top_logprobs[rows, :width], top_token_ids[rows, :width] = values, indices.to(torch.int32)
    return SampledTokens(tokens.to(torch.int32), logprobs, top_token_ids, top_logprobs)


def _draw(logits: Tensor, columns: SamplingColumns, rows: npt.NDArray[Any]) -> Tensor:
    """Returns the token ids, int64, of the given rows."""
    temperatures = np.maximum(columns.temperatures[rows], MIN_TEMPERATURE).astype(np.float32)
    scaled = logits[torch.from_numpy(rows)] / torch.from_numpy(temperatures)[:, None]
    if columns.adjustments is not None:
        scaled = without_unlikely(scaled, columns.adjustments.min_ps[rows])
    scaled = _filtered(scaled, columns.top_ks[rows], columns.top_ps[rows])
    noise = gumbel_noise(columns.seeds[rows], columns.choices[rows], columns.positions[rows], logits.shape[1])
    return torch.argmax(scaled.to(torch.float64) + torch.from_numpy(noise), dim=-1)


def _filtered(scaled: Tensor, top_ks: npt.NDArray[np.int64], top_ps: npt.NDArray[np.float64]) -> Tensor:
    """Logits with -inf outside the best top_k, then outside the smallest set that holds probability top_p."""
    vocab_size = scaled.shape[1]
    limits = np.where((top_ks > 0) & (top_ks < vocab_size), top_ks, vocab_size)
    if (limits == vocab_size).all() and (top_ps >= 1).all():
        return scaled
    ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocab_size)
    dropped = ranks[None, :] >= torch.from_numpy(limits)[:, None]
    probabilities = torch.softmax(ordered.masked_fill(dropped, -torch.inf), dim=-1, dtype=torch.float64)
    mass_before = torch.cumsum(probabilities, dim=-1) - probabilities
    cut = (mass_before >= torch.from_numpy(top_ps)[:, None]) & (torch.from_numpy(top_ps) < 1)[:, None]
    cut[:, 0] = False  # the best token always stays
    dropped = dropped | cut
    return torch.empty_like(scaled).scatter_(1, order, ordered.masked_fill(dropped, -torch.inf))


def gumbel_noise(
    seeds: npt.NDArray[np.int64], choices: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], vocab_size: int
) -> npt.NDArray[np.float64]:
    """Returns float64 [S, V]; each number depends on its own (seed, choice, position, token id) and on nothing else."""
    key = _mix(seeds.astype(np.uint64) + _GOLDEN)
    key = _mix(key ^ (choices.astype(np.uint64) + _GOLDEN))
    key = _mix(key ^ (positions.astype(np.uint64) + _GOLDEN))
    bits = _mix(key[:, None] + _GOLDEN * np.arange(1, vocab_size + 1, dtype=np.uint64)[None, :])
    # 52 bits, so that adding a half is exact: strictly between 0 and 1, and both logs are finite.
    uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log(uniform))


def _mix(state: Uint64Array) -> Uint64Array:
    """Computes the output function of SplitMix64; arithmetic wraps."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
