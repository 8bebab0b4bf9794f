"""Choosing tokens, for all rows of a step at once.

Gumbel-max (Maddison et al., arXiv 1411.0030): argmax of logits / temperature + noise. The noise of (request seed,
choice, position, token id) comes from a counter-based generator (SplitMix64, Steele et al. 2014), so that a row's token
does not depend on its batch mates, and a replayed request draws the same tokens. Penalties, biases and min_p shape what
is drawn (`penalties.py`); log-probabilities are of the model's own distribution, before all of that.

S rows, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.compute.linear import KERNEL_DTYPES
from common.compute.native_library import NativeKernels
from common.wire.array import Float32Array, Int32Array, Int64Array
from services.stage.model.logit_adjustments import adjusted_logits, margins_of, without_unlikely
from services.stage.model.micro_batch import SamplingColumns

ROWS_TOGETHER = 64
"""With drafts a step may have hundreds of rows: what is made of the logits of all of them would be many times as much
memory as without. A row's bits do not depend on the others."""
MIN_TEMPERATURE = 1e-30
"""Practically greedy; less would make the logits infinite, and of infinite ones none is the best."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
Uint64Array = npt.NDArray[np.uint64]
_ROW = np.dtype(
    [
        ("temperature", np.float64),
        ("margin", np.float64),
        ("top_p", np.float64),
        ("top_k", np.int64),
        ("seed", np.int64),
        ("choice", np.int64),
        ("position", np.int64),
        ("token", np.int64),
    ]
)
"""What the kernels take of a row, and its token; -1 there: they leave it to the rules."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What was chosen. P is the largest number of top logprobs that a row asked for (the rest is filler)."""

    token_ids: Int32Array
    """[S]."""
    logprobs: Float32Array
    """[S], of the model's own distribution; 0 where not asked for."""
    top_token_ids: Int32Array
    """[S, P]."""
    top_logprobs: Float32Array
    """[S, P]."""


def sample(logits: Tensor, columns: SamplingColumns, kernels: NativeKernels | None = None) -> SampledTokens:
    """logits [S, V] of any float dtype -> one token a row, as its columns ask for; ROWS_TOGETHER rows at a time."""
    num_top = int(columns.num_top_logprobs.max(initial=-1))
    if len(logits) <= ROWS_TOGETHER:
        return _sample_block(logits, columns, num_top, kernels)
    blocks: list[SampledTokens] = []
    for start in range(0, len(logits), ROWS_TOGETHER):
        stop = start + ROWS_TOGETHER
        blocks.append(_sample_block(logits[start:stop], columns.rows(start, stop), num_top, kernels))
    return SampledTokens(
        token_ids=np.concatenate([block.token_ids for block in blocks]),
        logprobs=np.concatenate([block.logprobs for block in blocks]),
        top_token_ids=np.concatenate([block.top_token_ids for block in blocks]),
        top_logprobs=np.concatenate([block.top_logprobs for block in blocks]),
    )


def _sample_block(
    logits: Tensor, columns: SamplingColumns, num_top: int, kernels: NativeKernels | None
) -> SampledTokens:
    """`num_top`: the largest number of top logprobs that a row of the step asked for; -1: none asks for any."""
    adjusted = logits
    if columns.adjustments is not None:
        adjusted = adjusted_logits(logits.to(torch.float32), columns.adjustments)
    if kernels is None:
        tokens = choose_by_rules(adjusted, columns, np.arange(len(columns.seeds)))
    else:
        tokens = _choose(adjusted, columns, kernels)
    logprobs = np.zeros(len(tokens), dtype=np.float32)
    top_token_ids = np.zeros((len(tokens), max(0, num_top)), dtype=np.int32)
    top_logprobs = np.zeros(top_token_ids.shape, dtype=np.float32)
    rows = np.flatnonzero(columns.num_top_logprobs >= 0)
    if rows.size:
        all_logprobs = torch.log_softmax(logits[torch.from_numpy(rows)].to(torch.float32), dim=-1)
        logprobs[rows] = all_logprobs.gather(1, torch.from_numpy(tokens[rows, None]))[:, 0].numpy()
        width = min(num_top, logits.shape[1])
        if width:
            top = _best(all_logprobs, width)
            top_token_ids[rows, :width] = top
            top_logprobs[rows, :width] = np.take_along_axis(all_logprobs.numpy(), top, axis=1)
    return SampledTokens(tokens.astype(np.int32), logprobs, top_token_ids, top_logprobs)


def _best(logprobs: Tensor, count: int) -> Int64Array:
    """logprobs [A, V] -> token ids [A, count], best first; of equals, the first ones.

    Which of equals `topk` takes depends on how many it takes, and so on what the other rows of a step ask for.
    """
    # What is not a number is as good as impossible here: it goes out as it is, and is refused there.
    logprobs = torch.nan_to_num(logprobs, nan=-torch.inf)
    values, least = logprobs.numpy(), torch.topk(logprobs, count, dim=-1).values[:, -1:].numpy()
    found = np.flatnonzero(values >= least)
    rows, tokens = np.divmod(found, logprobs.shape[1])
    order = np.lexsort((-values.reshape(-1)[found], rows))  # stable: equals stay in the order of their ids
    firsts = np.searchsorted(rows, np.arange(len(logprobs)))
    best: Int64Array = tokens[order][firsts[:, None] + np.arange(count)]
    return best


def _choose(logits: Tensor, columns: SamplingColumns, kernels: NativeKernels) -> Int64Array:
    """Returns what `choose_by_rules` does, of all rows."""
    if logits.dtype not in KERNEL_DTYPES or logits.stride(1) != 1:
        logits = logits.to(torch.float32).contiguous()
    (num_rows, vocab_size), adjustments = logits.shape, columns.adjustments
    wanted = np.empty(num_rows, dtype=_ROW)
    wanted["temperature"] = np.where(columns.temperatures > 0, np.maximum(columns.temperatures, MIN_TEMPERATURE), 0)
    wanted["margin"] = -np.inf if adjustments is None else margins_of(adjustments.min_ps)
    wanted["top_p"], wanted["top_k"] = columns.top_ps, columns.top_ks
    wanted["seed"], wanted["choice"], wanted["position"] = columns.seeds, columns.choices, columns.positions
    kernels.choose_tokens(
        logits.data_ptr(),
        logits.stride(0),
        wanted.ctypes.data,
        num_rows,
        vocab_size,
        int(logits.dtype == torch.bfloat16),
        kernels.threads,
    )
    tokens = wanted["token"].copy()
    left = np.flatnonzero(tokens < 0)
    if left.size:
        tokens[left] = choose_by_rules(logits, columns, left)
    return tokens


def choose_by_rules(logits: Tensor, columns: SamplingColumns, rows: Int64Array) -> Int64Array:
    """logits [S, V] with biases and penalties -> token ids of the given rows."""
    logits = logits[torch.from_numpy(rows)].to(torch.float32)
    tokens: Int64Array = torch.argmax(logits, dim=-1).numpy()
    drawn = np.flatnonzero(columns.temperatures[rows] > 0)
    if drawn.size:
        tokens[drawn] = _draw(logits[torch.from_numpy(drawn)], columns, rows[drawn]).numpy()
    return tokens


def _draw(logits: Tensor, columns: SamplingColumns, rows: Int64Array) -> Tensor:
    """logits: of the given rows."""
    temperatures = np.maximum(columns.temperatures[rows], MIN_TEMPERATURE).astype(np.float32)
    scaled = logits / torch.from_numpy(temperatures)[:, None]
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
