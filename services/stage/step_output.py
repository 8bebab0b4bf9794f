"""What a stage sends on when a step is through. No sockets.

T tokens, D model width, Q sequences of a micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
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


def class_number(before: int, classes: Sequence[str]) -> int:
    """Returns what stands for the stages before and for these classes: this stage's own, and those of the experts of
    its layers. 0 stays 0: some rows were computed by several classes."""
    if not before:
        return 0
    said = "\n".join((str(before), *classes)).encode()
    return int.from_bytes(hashlib.sha256(said).digest()[:8], "little") >> 1 or 1


def passed_on(slot: Slot, finished: Finished, numeric_class: int) -> Step | StepResult:
    """Returns what comes after this stage has computed a step: hidden states, sampled tokens, or, at the end of a
    replay, nothing but the step itself. `numeric_class`: of all stages up to this one, as `class_number` makes it."""
    running = finished.running
    numeric_class = 0 if running.is_mixed else numeric_class
    degraded = degraded_sequences(running.step, running.batch, running.degraded_rows)
    retried = running.step.retried_calls + running.num_retried_calls
    if slot.role.is_last:
        return _sampled(slot, finished, degraded, retried, numeric_class)
    return replace(
        running.step,
        degraded=flags_frame(degraded),
        numeric_class=numeric_class,
        retried_calls=retried,
        hidden=tensor_to_frame(finished.output) if _is_awaited(slot, running.step) else NO_ARRAY,
    )


def relayed(slot: Slot, step: Step, positions: Tensor, numeric_class: int) -> Step | StepResult:
    """Passes on a replay step that is for other slots. A later one that computes gets what was sent on for its tokens
    [T]. `numeric_class`: as if this stage had computed it."""
    if slot.role.is_last:
        return replace(EMPTY_RESULT, degraded=step.degraded, numeric_class=numeric_class)
    logged = tensor_to_frame(slot.held.memory.logged(positions)) if _is_awaited(slot, step) else NO_ARRAY
    return replace(step, hidden=logged, numeric_class=numeric_class)


def _is_awaited(slot: Slot, step: Step) -> bool:
    """Returns whether a later slot computes this step."""
    return not step.computing_slots or max(step.computing_slots) > slot.role.slot.index


def _sampled(slot: Slot, finished: Finished, degraded: BoolArray, retried_calls: int, numeric_class: int) -> StepResult:
    batch = finished.running.batch
    assert batch.sampling is not None
    with torch.inference_mode():
        sampled = sample(finished.output, batch.sampling, slot.sampling_kernels)
    rows = batch.sampling.accepted_rows(sampled.token_ids)
    sequence_ids, token_ids = batch.sampling.sequence_ids[rows], sampled.token_ids[rows]
    slot.adjustments.count(sequence_ids.tolist(), token_ids.tolist())
    return StepResult(
        sequence_ids=array_to_frame(sequence_ids),
        token_ids=array_to_frame(token_ids),
        logprobs=array_to_frame(sampled.logprobs[rows]),
        top_token_ids=array_to_frame(sampled.top_token_ids[rows]),
        top_logprobs=array_to_frame(sampled.top_logprobs[rows]),
        degraded=flags_frame(degraded),
        numeric_class=numeric_class,
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
