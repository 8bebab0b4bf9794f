"""Which sequences of a step went on without an expert, here or on a stage before. No sockets.

Q sequences of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from common.messages import NO_ARRAY, Step, TensorFrame
from common.wire.array import BoolArray, Uint8Array, array_to_frame, frame_to_array
from services.stage.model.micro_batch import MicroBatch


def degraded_sequences(step: Step, batch: MicroBatch, degraded_rows: Collection[int]) -> BoolArray:
    """[Q]: what the step says of the stages before, and the sequences of these token rows.

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
    """uint8 of the same length, or nothing where no flag is set."""
    return array_to_frame(flags.astype(np.uint8)) if flags.any() else NO_ARRAY
