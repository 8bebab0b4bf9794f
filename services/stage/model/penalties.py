"""Biases, penalties and min_p on logits, for all rows of a step at once.

In vLLM's order: biases, then the repetition penalty (Keskar et al., arXiv 1909.05858), then frequency and presence
(OpenAI's formula), and after the temperature min_p (Nguyen et al., arXiv 2407.01082). Everything is element by element
in float32, so that a row's bits do not depend on its batch mates. S rows, V tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.stage.model.logit_adjustments import LogitAdjustments

MAX_LOGIT = 1e8
"""No number of a peer's makes logits larger: of infinite ones none is the best, also after the temperature."""


def adjusted_logits(logits: Tensor, adjustments: LogitAdjustments) -> Tensor:
    """float32 [S, V] -> a new tensor of that kind with biases and penalties. Tokens outside [0, V) say nothing."""
    adjusted = logits.clone()
    within = adjustments.bias_places[:, 1] < logits.shape[1]
    rows, tokens = torch.from_numpy(adjustments.bias_places[within].T.copy())
    with np.errstate(over="ignore"):  # what is so unlikely is not drawn
        biases = np.minimum(adjustments.biases[within], MAX_LOGIT).astype(np.float32)
    adjusted[rows, tokens] += torch.from_numpy(biases)
    counts = adjustments.token_counts[adjustments.token_counts[:, 1] < logits.shape[1]]
    if len(counts):
        _penalise(adjusted, counts.astype(np.int64), adjustments)
    return adjusted


def _penalise(adjusted: Tensor, counts: npt.NDArray[np.int64], adjustments: LogitAdjustments) -> None:
    """In place. `counts` [H, 4], see LogitAdjustments."""
    row_numbers, times_generated = counts[:, 0], counts[:, 2]
    repetitions = np.clip(adjustments.repetition_penalties, 1 / MAX_LOGIT, MAX_LOGIT)[row_numbers]
    repetition = torch.from_numpy(repetitions.astype(np.float32))
    frequency, presence = (
        torch.from_numpy(np.clip(penalties, -MAX_LOGIT, MAX_LOGIT)[row_numbers].astype(np.float32))
        for penalties in (adjustments.frequency_penalties, adjustments.presence_penalties)
    )
    count = torch.from_numpy(times_generated.astype(np.float32))
    rows, tokens = torch.from_numpy(row_numbers.copy()), torch.from_numpy(counts[:, 1].copy())
    values = adjusted[rows, tokens]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * count
    values -= presence * (count > 0)
    adjusted[rows, tokens] = values.clamp(max=MAX_LOGIT)


def without_unlikely(scaled: Tensor, min_ps: npt.NDArray[np.float64]) -> Tensor:
    """[S, V] with -inf where a token is less likely than the likeliest of its row times min_p [S]; 0: off."""
    if not min_ps.any():
        return scaled
    with np.errstate(divide="ignore"):
        margins = torch.from_numpy(np.log(min_ps).astype(np.float32))
    # p < min_p * p_max is logit < logit_max + ln(min_p): no sum over the row, and the likeliest always stays.
    floors = scaled.max(dim=-1, keepdim=True).values + margins[:, None]
    return scaled.masked_fill(scaled < floors, -torch.inf)
