"""A stage that computes nothing: `python -m tests.benchmarks.null_stage MILLISECONDS`.

It takes a role like any other stage, and answers a step when so much time has passed since it came, 0: at once. On the
last slot every sequence that samples gets a token, the same one for one step. No draft is ever right.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np

from common.messages import NO_ARRAY, Header, Step, StepResult
from common.wire.array import array_to_frame, frame_to_array
from common.wire.records import STEP_SEQUENCE, frame_to_records
from services.stage import service
from services.stage.__main__ import main
from services.stage.slot.slot import Slot
from services.stage.step_output import EMPTY_RESULT

FIRST_TOKEN, NUM_TOKENS = 280, 99
"""Tokens of `tiny_checkpoint` that are whole characters, so that each makes an event."""


def result_of(step: Step, number: int) -> StepResult:
    """Returns what the last stage says of a step of this number."""
    sequences = frame_to_records(step.sequences, STEP_SEQUENCE, None, "Step.sequences")
    num_rows = sequences["samples"][sequences["samples"] != 0]
    sampling = sequences["sequence_id"][sequences["samples"] != 0]
    drafts = frame_to_array(step.drafts, "int32", (None,), "Step.drafts")
    first_drafts = (np.cumsum(num_rows - 1) - num_rows + 1)[num_rows > 1]
    tokens = np.full(len(sampling), FIRST_TOKEN + number % NUM_TOKENS, dtype=np.int32)
    tokens[num_rows > 1] += drafts[first_drafts] == tokens[num_rows > 1]
    return replace(
        EMPTY_RESULT,
        sequence_ids=array_to_frame(np.ascontiguousarray(sampling)),
        token_ids=array_to_frame(tokens),
        logprobs=array_to_frame(np.zeros(len(sampling), dtype=np.float32)),
        top_token_ids=array_to_frame(np.zeros((len(sampling), 0), dtype=np.int32)),
        top_logprobs=array_to_frame(np.zeros((len(sampling), 0), dtype=np.float32)),
    )


def answer_after(delay_s: float) -> None:
    """Has stages of this process compute nothing from now on."""

    def begin_step(self: service.StageService, slot: Slot, step: Step, header: Header, now_s: float) -> None:
        time.sleep(delay_s)
        slot.held.watermark.begin(header.step, step.previous_step)
        slot.held.watermark.finish(header.step)
        message = result_of(step, header.step) if slot.role.is_last else replace(step, hidden=NO_ARRAY)
        self._send_on(message, header, now_s + header.time_left_ms / 1000)

    vars(service)["StageService"]._begin_step = begin_step


if __name__ == "__main__":
    answer_after(float(sys.argv[1]) / 1000)
    sys.exit(main())
