"""What the scheduler decides <-> what travels: StepPlan -> Step, StepResult -> sampled tokens. Pure: numpy only.

The last stage keeps penalties and biases, and counts tokens on by itself: a row is told anew only where it cannot know
(see `Request.tells_adjustments`). A client's thousand biases travel once, not with each of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from common.errors import ProtocolError
from common.ids import SequenceId
from common.messages import FIRST_CLASS, NO_PAIRS, Header, Step, StepResult, TensorFrame
from common.wire.array import Float64Array, Int32Array, Int64Array, array_to_frame, frame_to_array
from common.wire.records import SAMPLING, SEED, STEP_SEQUENCE, records_to_frame
from services.router.engine import Token
from services.router.scheduling.step_plan import ComputedBy, ScheduledChunk, StepPlan


def step_message(plan: StepPlan) -> Step:
    """Makes a plan a message, as the first stage takes it."""
    computed = plan.computed
    sampled = [chunk for chunk in computed if chunk.samples]
    sequences = [
        (
            chunk.sequence_id,
            chunk.start_position,
            len(chunk.token_ids),
            chunk.block_offset,
            len(chunk.new_block_ids),
            chunk.num_sampling_rows,
        )
        for chunk in computed
    ]
    sampling = [
        (
            chunk.sampling.temperature,
            chunk.sampling.top_p,
            chunk.sampling.top_k,
            -1 if chunk.sampling.num_top_logprobs is None else chunk.sampling.num_top_logprobs,
        )
        for chunk in sampled
    ]
    token_ids = [token_id for chunk in computed for token_id in chunk.token_ids]
    new_blocks = [block for chunk in computed for block in chunk.new_block_ids]
    seeds = [(chunk.sampling.seed, chunk.choice) for chunk in sampled]
    drafts = [token_id for chunk in sampled for token_id in chunk.draft_token_ids]
    step = Step(
        hidden=array_to_frame(np.array(token_ids, dtype=np.int32)),
        sequences=records_to_frame(sequences, STEP_SEQUENCE),
        new_blocks=array_to_frame(np.array(new_blocks, dtype=np.int32)),
        released=array_to_frame(np.array(plan.released, dtype=np.int64)),
        sampling=records_to_frame(sampling, SAMPLING),
        seeds=records_to_frame(seeds, SEED),
        computing_slots=plan.computing_slots,
        previous_step=plan.previous_step,
        numeric_class=FIRST_CLASS,
        awaited_step=plan.awaited_step,
        drafts=array_to_frame(np.array(drafts, dtype=np.int32)),
        saves=_pairs(plan.saves),
        restores=_pairs(plan.restores),
    )
    adjusted = adjusted_rows(sampled)
    if not len(adjusted):
        return step
    return replace(
        step,
        penalties=array_to_frame(penalty_rows(sampled)),
        token_counts=array_to_frame(count_rows(sampled)),
        biases=array_to_frame(bias_rows(sampled)),
        adjusted=array_to_frame(adjusted),
    )


def _pairs(pairs: Sequence[tuple[int, int]]) -> TensorFrame:
    return array_to_frame(np.array(pairs, dtype=np.int32)) if pairs else NO_PAIRS


def unsendable_sequences(plan: StepPlan) -> dict[SequenceId, Exception]:
    """Finds sequences of a plan that cannot be encoded, even in a step of their own; with what they raise."""
    culprits: dict[SequenceId, Exception] = {}
    for chunk in plan.chunks:
        try:
            step_message(replace(plan, chunks=(chunk,), released=(), saves=()))
        except Exception as error:
            culprits[chunk.sequence_id] = error
    return culprits


def step_header(plan: StepPlan, router_term: int, time_left_ms: int) -> Header:
    """Makes the header with the counters that fence a step."""
    return Header(
        router_term=router_term,
        generation=plan.generation,
        step=plan.step,
        time_left_ms=time_left_ms,
        trace=f"{plan.pipeline}/{plan.step}",
    )


def sampled_tokens(result: StepResult, plan: StepPlan, vocab_size: int) -> dict[SequenceId, tuple[Token, ...]]:
    """Reads what the last stage drew, by sequence: the drafts that were right, and the token after them. Raises
    ProtocolError if it is not what the plan asks for."""
    answered: Int64Array = frame_to_array(result.sequence_ids, "int64", (None,), "StepResult.sequence_ids")
    count, most = len(answered), sum(chunk.num_sampling_rows for chunk in plan.chunks)
    if count > most:  # looked at before anything is done for each of them
        raise ProtocolError(f"StepResult has {count} tokens, the step asked for {most} at most, with its drafts")
    ids = answered.tolist()
    tokens = frame_to_array(result.token_ids, "int32", (count,), "StepResult.token_ids").tolist()
    logprobs = frame_to_array(result.logprobs, "float32", (count,), "StepResult.logprobs")
    top_ids = frame_to_array(result.top_token_ids, "int32", (count, None), "StepResult.top_token_ids")
    top_logprobs = frame_to_array(result.top_logprobs, "float32", top_ids.shape, "StepResult.top_logprobs")
    wanted = {chunk.sequence_id: chunk.sampling.num_top_logprobs for chunk in plan.chunks if chunk.samples}
    if wanted.keys() != set(ids):
        raise ProtocolError(f"StepResult answers {len(set(ids))} sequences, the step asked for {len(wanted)}")
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ProtocolError(f"StepResult.token_ids holds an id outside [0, {vocab_size})")
    if not (np.isfinite(logprobs).all() and np.isfinite(top_logprobs).all()):
        raise ProtocolError("StepResult.logprobs or top_logprobs holds a number that is not finite")
    num_columns = max((num_top or 0 for num_top in wanted.values()), default=0)
    if top_ids.shape[1] < num_columns:
        raise ProtocolError(
            f"StepResult.top_token_ids has {top_ids.shape[1]} columns, the step asked for {num_columns}"
        )
    degraded = computed_by(result, plan).degraded
    sampled: dict[SequenceId, list[Token]] = {sequence_id: [] for sequence_id in wanted}
    for row, sequence_id in enumerate(ids):
        token = Token(tokens[row], degraded=sequence_id in degraded)
        if (num_top := wanted[sequence_id]) is not None:
            top = zip(top_ids[row, :num_top].tolist(), top_logprobs[row, :num_top].tolist(), strict=True)
            token = replace(token, logprob=float(logprobs[row]), top_logprobs=tuple(top))
        sampled[sequence_id].append(token)
    for chunk in plan.chunks:
        if chunk.samples:
            _check_accepted(chunk, [token.token_id for token in sampled[chunk.sequence_id]])
    return {sequence_id: tuple(drawn) for sequence_id, drawn in sampled.items()}


def _check_accepted(chunk: ScheduledChunk, token_ids: Sequence[int]) -> None:
    """Raises ProtocolError unless these are the drafts up to the first wrong one, and the token in place of that."""
    drafts, num_accepted = chunk.draft_token_ids, len(token_ids) - 1
    if num_accepted > len(drafts) or tuple(token_ids[:-1]) != drafts[:num_accepted]:
        raise ProtocolError(
            f"StepResult answers sequence {chunk.sequence_id} with {len(token_ids)} tokens, of which all but the last "
            f"must be the first of its {len(drafts)} drafts"
        )
    if num_accepted < len(drafts) and token_ids[-1] == drafts[num_accepted]:
        raise ProtocolError(f"StepResult ends sequence {chunk.sequence_id} with a draft that was right")


def computed_by(result: StepResult, plan: StepPlan) -> ComputedBy:
    """Reads what others may find of a step. Raises ProtocolError if the flags are not those of the plan's sequences."""
    flags: list[int] = []
    if result.degraded.shape != (0,):
        flags = frame_to_array(result.degraded, "uint8", (len(plan.computed),), "StepResult.degraded").tolist()
    degraded = (chunk.sequence_id for chunk, flag in zip(plan.computed, flags, strict=False) if flag)
    return ComputedBy(result.numeric_class, frozenset(degraded))


def adjusted_rows(sampled: Sequence[ScheduledChunk]) -> Int64Array:
    """Returns `Step.adjusted`: int64 [*, 3], of the chunks that sample."""
    rows = [
        (row, chunk.num_generated, int(chunk.tells_adjustments))
        for row, chunk in enumerate(sampled)
        if chunk.sampling.adjusts(chunk.num_generated)
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def penalty_rows(sampled: Sequence[ScheduledChunk]) -> Float64Array:
    """Returns `Step.penalties`: float64 [*, 5]."""
    rows = [
        (row, sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
        for row, chunk in enumerate(sampled)
        if chunk.tells_adjustments and ((sampling := chunk.sampling).min_p or sampling.counts_tokens)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


def count_rows(sampled: Sequence[ScheduledChunk]) -> Int32Array:
    """Returns `Step.token_counts`: int32 [*, 4]."""
    parts = []
    for row, chunk in enumerate(sampled):
        if chunk.tells_adjustments and chunk.token_counts:
            counts = np.frombuffer(chunk.token_counts, dtype=np.int32).reshape(-1, 3)
            parts.append(np.insert(counts, 0, row, axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 4), dtype=np.int32)


def bias_rows(sampled: Sequence[ScheduledChunk]) -> Float64Array:
    """Returns `Step.biases`: float64 [*, 3]; stop tokens of a choice that is too short to end have -inf."""
    parts = []
    for row, chunk in enumerate(sampled):
        sampling = chunk.sampling
        is_early = sampling.is_early(chunk.num_generated)
        if chunk.tells_adjustments and (is_early or sampling.logit_bias):
            table = sampling.early_bias_table if is_early else sampling.bias_table
            parts.append(np.insert(table, 0, row, axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 3), dtype=np.float64)
