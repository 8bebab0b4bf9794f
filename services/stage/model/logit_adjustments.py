"""Penalties and biases of the sequences that a last stage samples: told once, kept, counted on from there, and applied.

A step says of each sequence whether it is told anew or goes on (`Step.adjusted`). What is kept lives as long as the
slot's generation: with another one, its holder is told anew. A row behind drafts is adjusted as if these had been
sampled; they are counted once it is known that they were.

They are applied to all rows of a step at once, in vLLM's order: biases, then the repetition penalty (Keskar et al.,
arXiv 1909.05858), then frequency and presence (OpenAI's formula), and after the temperature min_p (Nguyen et al., arXiv
2407.01082). Everything is element by element in float32, so that a row's bits do not depend on its batch mates. S rows,
V tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import ProtocolError
from common.messages import Step
from common.wire.array import Float64Array, Int32Array, Int64Array, frame_to_array


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

    def rows(self, start: int, stop: int) -> LogitAdjustments:
        """Returns those of rows [start, stop), which count from 0 there."""
        counted, biased = (
            (places[:, 0] >= start) & (places[:, 0] < stop) for places in (self.token_counts, self.bias_places)
        )
        return LogitAdjustments(
            min_ps=self.min_ps[start:stop],
            presence_penalties=self.presence_penalties[start:stop],
            frequency_penalties=self.frequency_penalties[start:stop],
            repetition_penalties=self.repetition_penalties[start:stop],
            token_counts=self.token_counts[counted] - np.array([start, 0, 0, 0], dtype=np.int32),
            bias_places=self.bias_places[biased] - np.array([start, 0]),
            biases=self.biases[biased],
        )


class CountedTokens:
    """Tokens that have come up in one sequence: [*, 3] token id, times generated, 1 if in the prompt."""

    def __init__(self, rows: Int32Array) -> None:
        """`rows`: each token once. Raises ProtocolError if not."""
        self._row_of = {token_id: row for row, token_id in enumerate(rows[:, 0].tolist())}
        if len(self._row_of) != len(rows):
            raise ProtocolError("Step.token_counts names a token twice")
        self._rows = rows.copy()

    @property
    def rows(self) -> Int32Array:
        """Returns all tokens, in order of appearance."""
        return self._rows[: len(self._row_of)]

    def add(self, token_id: int) -> None:
        """Counts a token that was generated once more."""
        row = self._row_of.setdefault(token_id, len(self._row_of))
        if row == len(self._rows):
            self._rows = np.concatenate((self._rows, np.zeros((max(64, row), 3), dtype=np.int32)))
        self._rows[row, 0] = token_id
        self._rows[row, 1] += 1

    def rows_after(self, token_ids: Sequence[int]) -> Int32Array:
        """Returns what `rows` would be if these tokens had been generated too."""
        if not token_ids:
            return self.rows
        rows = np.concatenate((self.rows, np.zeros((len(token_ids), 3), dtype=np.int32)))
        added: dict[int, int] = {}
        for token_id in token_ids:
            row = self._row_of.get(token_id)
            if row is None:
                row = added.setdefault(token_id, len(self._row_of) + len(added))
            rows[row, 0] = token_id
            rows[row, 1] += 1
        return rows[: len(self._row_of) + len(added)]


@dataclass(slots=True)
class _KeptSequence:
    num_generated: int
    penalties: Float64Array
    """[4]: min_p, presence, frequency, repetition."""
    counts: CountedTokens | None
    """None: no penalty looks at them."""
    biases: Float64Array
    """[*, 2]: token id, what is added."""


_NEUTRAL: Float64Array = np.array([0.0, 0.0, 0.0, 1.0])


@dataclass(slots=True)
class KeptAdjustments:
    """The adjustments of one slot in one generation."""

    _sequences: dict[int, _KeptSequence] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._sequences)

    def release(self, sequence_ids: Iterable[int]) -> None:
        """Forgets sequences that have ended."""
        for sequence_id in sequence_ids:
            self._sequences.pop(sequence_id, None)

    def count(self, sequence_ids: Iterable[int], token_ids: Iterable[int]) -> None:
        """Counts the tokens that were sampled, each of its sequence."""
        for sequence_id, token_id in zip(sequence_ids, token_ids, strict=True):
            kept = self._sequences.get(sequence_id)
            if kept is not None:
                kept.num_generated += 1
                if kept.counts is not None:
                    kept.counts.add(token_id)

    def apply(self, step: Step, sequence_ids: Int64Array, drafts: Sequence[Int32Array] = ()) -> LogitAdjustments | None:
        """Applies what a step tells, and returns what the rows of these sequences are adjusted by. None: by nothing.

        `drafts`: of each sequence, which has one row more than these; empty: none has any. Raises ProtocolError, also
        where a sequence goes on that is not known here, or with another number of tokens.
        """
        self.release(frame_to_array(step.released, "int64", (None,), "Step.released").tolist())
        adjusted: Int64Array = frame_to_array(step.adjusted, "int64", (None, 3), "Step.adjusted")
        penalties: Float64Array = frame_to_array(step.penalties, "float64", (None, 5), "Step.penalties")
        counts: Int32Array = frame_to_array(step.token_counts, "int32", (None, 4), "Step.token_counts")
        biases: Float64Array = frame_to_array(step.biases, "float64", (None, 3), "Step.biases")
        if not len(adjusted) + len(penalties) + len(counts) + len(biases):
            return None
        told = _read_told(adjusted, penalties, counts, biases, len(sequence_ids))
        kept: dict[int, _KeptSequence] = {}
        for row, num_generated, is_anew in adjusted.tolist():
            sequence_id = int(sequence_ids[row])
            if is_anew:
                self._sequences[sequence_id] = told.sequence(row, num_generated)
            elif sequence_id not in self._sequences:
                raise ProtocolError(f"Step.adjusted goes on with sequence {sequence_id}, which is not known here")
            kept[row] = self._sequences[sequence_id]
            if kept[row].num_generated != num_generated:
                raise ProtocolError(
                    f"Step.adjusted says that sequence {sequence_id} has {num_generated} tokens, "
                    f"{kept[row].num_generated} were counted here"
                )
        return _lay_out(kept, [own.tolist() for own in drafts] or [[]] * len(sequence_ids))


@dataclass(frozen=True, slots=True)
class _Told:
    """What a step says of the rows that it tells anew."""

    penalties: dict[int, Float64Array]
    counts: Int32Array
    biases: Float64Array

    def sequence(self, row: int, num_generated: int) -> _KeptSequence:
        penalties = self.penalties.get(row, _NEUTRAL)
        counts = self.counts[self.counts[:, 0] == row, 1:]
        is_counted = len(counts) or (penalties[1:] != _NEUTRAL[1:]).any()
        biases = self.biases[self.biases[:, 0] == row, 1:]
        return _KeptSequence(num_generated, penalties, CountedTokens(counts) if is_counted else None, biases)


def _read_told(
    adjusted: Int64Array, penalties: Float64Array, counts: Int32Array, biases: Float64Array, num_rows: int
) -> _Told:
    rows, num_generated, is_anew = adjusted.T
    if not (((rows >= 0) & (rows < num_rows)).all() and len(np.unique(rows)) == len(rows)):
        raise ProtocolError(f"Step.adjusted holds a row outside [0, {num_rows}), or one twice")
    if (num_generated < 0).any() or not ((is_anew == 0) | (is_anew == 1)).all():
        raise ProtocolError("Step.adjusted holds a number of tokens below 0, or one that is neither 0 nor 1")
    _check_penalties(penalties, num_rows)
    if len(counts) and (counts.min() < 0 or counts[:, 0].max() >= num_rows or counts[:, 3].max() > 1):
        raise ProtocolError(f"Step.token_counts holds a number that is not a count, or a row outside [0, {num_rows})")
    if len(biases) and not ((biases[:, :2] >= 0) & (biases[:, :2] < (num_rows, 1 << 31))).all():
        raise ProtocolError(f"Step.biases holds a row outside [0, {num_rows}), or no token id")
    if not (biases[:, 2] < np.inf).all():
        raise ProtocolError("Step.biases holds a bias that is not a number")
    anew = rows[is_anew == 1]
    for name, named in (("penalties", penalties[:, 0]), ("token_counts", counts[:, 0]), ("biases", biases[:, 0])):
        if not np.isin(named, anew).all():
            raise ProtocolError(f"Step.{name} has a row that Step.adjusted does not tell anew")
    return _Told({int(row[0]): row[1:].copy() for row in penalties}, counts, biases)


def _check_penalties(penalties: Float64Array, num_rows: int) -> None:
    if not np.isfinite(penalties).all():
        raise ProtocolError("Step.penalties holds a number that is not finite")
    rows, min_ps, repetitions = penalties[:, 0], penalties[:, 1], penalties[:, 4]
    if not ((rows >= 0) & (rows < num_rows)).all():
        raise ProtocolError(f"Step.penalties holds a row outside [0, {num_rows})")
    if not ((min_ps >= 0) & (min_ps <= 1) & (repetitions > 0)).all():
        raise ProtocolError("Step.penalties holds a min_p outside [0, 1], or a repetition penalty that is not above 0")


def _lay_out(kept: dict[int, _KeptSequence], drafts: Sequence[list[int]]) -> LogitAdjustments:
    """`kept`: by place of a sequence. `drafts`: of each; a row is adjusted as if those before it had been sampled."""
    stops = np.cumsum([len(own) + 1 for own in drafts]).tolist()
    dense = np.tile(_NEUTRAL, (stops[-1], 1))
    counts, biases = [np.zeros((0, 4), dtype=np.int32)], [np.zeros((0, 3))]
    for place, sequence in kept.items():
        own = drafts[place]
        for num_before in range(len(own) + 1):
            row = stops[place] - 1 - len(own) + num_before
            dense[row] = sequence.penalties
            if sequence.counts is not None:
                counts.append(np.insert(sequence.counts.rows_after(own[:num_before]), 0, row, axis=1))
            biases.append(np.insert(sequence.biases, 0, row, axis=1))
    all_biases = np.concatenate(biases)
    return LogitAdjustments(
        min_ps=dense[:, 0],
        presence_penalties=dense[:, 1],
        frequency_penalties=dense[:, 2],
        repetition_penalties=dense[:, 3],
        token_counts=np.concatenate(counts),
        bias_places=all_biases[:, :2].astype(np.int64),
        biases=all_biases[:, 2],
    )


MAX_LOGIT = 1e8
"""No number of a peer's makes logits larger: of infinite ones none is the best, also after the temperature."""


def adjusted_logits(logits: Tensor, adjustments: LogitAdjustments) -> Tensor:
    """Returns float32 [S, V] like `logits`, with biases and penalties. Tokens outside [0, V) say nothing."""
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
    """Changes them in place. `counts` [H, 4], see LogitAdjustments."""
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
    """Returns [S, V] with -inf where a token is less likely than the likeliest of its row times min_p [S]; 0: off."""
    if not min_ps.any():
        return scaled
    margins = torch.from_numpy(margins_of(min_ps))
    # p < min_p * p_max is logit < logit_max + ln(min_p): no sum over the row, and the likeliest always stays.
    floors = scaled.max(dim=-1, keepdim=True).values + margins[:, None]
    return scaled.masked_fill(scaled < floors, -torch.inf)


def margins_of(min_ps: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Returns [S]: how far from the best logit of its row one may be; minus infinity where min_p is off."""
    with np.errstate(divide="ignore"):
        return np.log(min_ps).astype(np.float32)
