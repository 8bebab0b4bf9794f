"""What a stage sends on when a step is through. No sockets.

T tokens, D model width, Q sequences of a micro-batch, S of them that sample a token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common.messages import NO_ARRAY, Step, StepResult, TensorFrame
from common.wire.array import BoolArray, Uint8Array, array_to_frame, frame_to_array
from common.wire.tensor import tensor_to_frame
from services.stage.model.executor import Finished
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.sampling import sample
from services.stage.slot.slot import Slot

EMPTY_RESULT = StepResult(
    array_to_frame(np.zeros(0, dtype=np.int64)),
    array_to_frame(np.zeros(0, dtype=np.int32)),
    array_to_frame(np.zeros(0, dtype=np.float32)),
    array_to_frame(np.zeros((0, 0), dtype=np.int32)),
    array_to_frame(np.zeros((0, 0), dtype=np.float32)),
)
"""The result of a step that samples nothing."""


def passed_on(slot: Slot, finished: Finished) -> Step | StepResult:
    """Returns what comes after this stage has computed a step: hidden states, sampled tokens, or, at the end of a
    replay, nothing but the step itself."""
    running = finished.running
    degraded = degraded_sequences(running.step, running.batch, running.degraded_rows)
    retried = running.step.retried_calls + running.num_retried_calls
    if slot.role.is_last:
        return _sampled(slot, finished, degraded, retried)
    return replace(
        running.step,
        degraded=flags_frame(degraded),
        retried_calls=retried,
        hidden=tensor_to_frame(finished.output) if _is_awaited(slot, running.step) else NO_ARRAY,
    )


def relayed(slot: Slot, step: Step, positions: Tensor) -> Step | StepResult:
    """Passes on a replay step that is for other slots. A later one that computes gets what was sent on for its tokens
    [T]."""
    if slot.role.is_last:
        return EMPTY_RESULT
    logged = tensor_to_frame(slot.held.memory.logged(positions)) if _is_awaited(slot, step) else NO_ARRAY
    return replace(step, hidden=logged)


def _is_awaited(slot: Slot, step: Step) -> bool:
    """Returns whether a later slot computes this step."""
    return not step.computing_slots or max(step.computing_slots) > slot.role.slot.index


def _sampled(slot: Slot, finished: Finished, degraded: BoolArray, retried_calls: int) -> StepResult:
    batch = finished.running.batch
    assert batch.sampling is not None
    with torch.inference_mode():
        sampled = sample(finished.output, batch.sampling, slot.sampling_kernels)
    slot.adjustments.count(batch.sampling.sequence_ids.tolist(), sampled.token_ids.tolist())
    return StepResult(
        sequence_ids=array_to_frame(np.ascontiguousarray(batch.sampling.sequence_ids)),
        token_ids=array_to_frame(sampled.token_ids),
        logprobs=array_to_frame(sampled.logprobs),
        top_token_ids=array_to_frame(sampled.top_token_ids),
        top_logprobs=array_to_frame(sampled.top_logprobs),
        degraded=flags_frame(degraded[batch.row_sequence[batch.sampling_rows].numpy()]),
        retried_calls=retried_calls,
    )


def degraded_sequences(step: Step, batch: MicroBatch, degraded_rows: Collection[int]) -> BoolArray:
    """Returns [Q]: what the step says of the stages before, and the sequences of these token rows.

    Raises ProtocolError if the step has another number of flags than sequences.
    """
    num_sequences = batch.block_tables.shape[0]
    degraded = np.zeros(num_sequences, dtype=np.bool_)
    if step.degraded.shape != (0,):
        before: Uint8Array = frame_to_array(step.degraded, "uint8", (num_sequences,), "Step.degraded")
        degraded |= before != 0
    if degraded_rows:
        degraded[batch.row_sequence.numpy()[sorted(degraded_rows)]] = True
    return degraded


def flags_frame(flags: BoolArray) -> TensorFrame:
    """Returns uint8 of the same length, or nothing where no flag is set."""
    return array_to_frame(flags.astype(np.uint8)) if flags.any() else NO_ARRAY
