"""Router -> first stage -> ... -> last stage -> router: the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from common.messages.frames import NO_ARRAY, TensorFrame

NO_PENALTIES = TensorFrame("float64", (0, 5), b"")
NO_TOKEN_COUNTS = TensorFrame("int32", (0, 4), b"")
NO_BIASES = TensorFrame("float64", (0, 3), b"")
NOT_ADJUSTED = TensorFrame("int64", (0, 3), b"")


@dataclass(frozen=True, slots=True)
class Step:
    """One micro-batch on its way through a pipeline. Q sequences, T tokens in all, S sequences that sample a token."""

    hidden: TensorFrame
    """int32 [T] token ids towards the first stage; model dtype [T, D] hidden states between stages."""
    sequences: TensorFrame
    """int64 [Q, 6], `records.STEP_SEQUENCE`: sequence id, start position, tokens, blocks known before, new blocks, 1 if
    it samples."""
    new_blocks: TensorFrame
    """int32 [sum of new blocks]: KV block ids, in order of the sequences."""
    released: TensorFrame
    """int64 [*]: sequences whose state can be dropped before this step."""
    sampling: TensorFrame
    """float64 [S, 4], `records.SAMPLING`: temperature (0 greedy), top_p, top_k (0 off), number of top logprobs (-1: no
    logprobs)."""
    seeds: TensorFrame
    """int64 [S, 2], `records.SEED`: request seed, choice."""
    computing_slots: tuple[int, ...] = ()
    """Of a replay step, the slots that compute; those before them answer from their activation log, those after them
    do nothing. Empty: an ordinary step, all compute."""
    penalties: TensorFrame = NO_PENALTIES
    """float64 [*, 5]: row in [0, S), min_p, presence, frequency and repetition penalty; of rows that are told anew and
    have any."""
    token_counts: TensorFrame = NO_TOKEN_COUNTS
    """int32 [*, 4]: row in [0, S), token id, times generated, 1 if in the prompt: what penalties look at; of rows that
    are told anew. The last stage counts on by itself."""
    biases: TensorFrame = NO_BIASES
    """float64 [*, 3]: row in [0, S), token id, what is added to its logit; -inf: must not be drawn; of rows that are
    told anew."""
    degraded: TensorFrame = NO_ARRAY
    """uint8 [Q]: 1 where a stage before went on without an expert; [0] where none did."""
    retried_calls: int = 0
    """Expert calls that stages before asked of another copy too, or instead."""
    previous_step: int = 0
    """Number of the step that the router sent before this one in the same generation of the pipeline; 0: it is the
    first. Steps overtake each other, so this alone tells a stage whether all that come before one have come."""
    adjusted: TensorFrame = NOT_ADJUSTED
    """int64 [*, 3]: row in [0, S), tokens generated so far, 1 if it is told anew; only rows with a penalty, a min_p or
    a bias. A row is told anew when its sequence first samples in a generation, and when its biases change; else the
    last stage goes on with what it keeps, which must have as many tokens."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Last stage -> router: the sampled tokens of a step. P is the largest number of top logprobs asked for."""

    sequence_ids: TensorFrame
    """int64 [S]."""
    token_ids: TensorFrame
    """int32 [S]."""
    logprobs: TensorFrame
    """float32 [S] of the sampled tokens, before penalties, temperature and filters."""
    top_token_ids: TensorFrame
    """int32 [S, P]."""
    top_logprobs: TensorFrame
    """float32 [S, P]."""
    degraded: TensorFrame = NO_ARRAY
    """uint8 [S]: 1 where a stage went on without an expert in this step; [0] where none did."""
    retried_calls: int = 0
    """Expert calls of all stages that were asked of another copy too, or instead."""
