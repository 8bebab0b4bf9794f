"""Steps that the router sent before their tokens were known. Pure: numpy only.

The router plans a decode step while the one before it is under way. Where `Step.hidden` then has AWAITED_TOKEN, the
token is the one that `Step.awaited_step` samples for the same sequence. The first stage knows it as soon as the last
one, which tells it, or is it itself. Until then such a step waits here, and what comes behind it waits too, so that
steps begin in the order in which they were sent, each with all of its tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from common.errors import ProtocolError
from common.messages import AWAITED_TOKEN, Header, Step, StepResult
from common.wire.array import array_to_frame, frame_to_array
from common.wire.records import STEP_SEQUENCE, frame_to_records

KEPT_STEPS = 16
"""Samples of so many steps are kept. A step is planned ahead of the only one in flight, so that what it waits for is
sampled behind nearly all that were sent before it; and what comes behind it begins later."""


@dataclass(frozen=True, slots=True)
class ArrivedStep:
    """A step that has come and has not begun."""

    step: Step
    header: Header
    arrived_s: float


class EarlySteps:
    """Those of one slot in one generation."""

    def __init__(self) -> None:
        self._arrived: deque[ArrivedStep] = deque()
        self._samples: dict[int, dict[int, int]] = {}
        """Tokens by sequence, of the steps that were sampled last, the oldest first."""

    def __len__(self) -> int:
        return len(self._arrived)

    def add(self, step: Step, header: Header, now_s: float) -> None:
        """Adds one that has just come."""
        self._arrived.append(ArrivedStep(step, header, now_s))

    def note_samples(self, number: int, result: StepResult) -> None:
        """Notes what the step of this number has sampled. Raises ProtocolError where that is not in order."""
        sequence_ids = frame_to_array(result.sequence_ids, "int64", (None,), "StepResult.sequence_ids")
        token_ids = frame_to_array(result.token_ids, "int32", sequence_ids.shape, "StepResult.token_ids")
        self._samples[number] = dict(zip(sequence_ids.tolist(), token_ids.tolist(), strict=True))
        if len(self._samples) > KEPT_STEPS:
            del self._samples[next(iter(self._samples))]

    def pop(self) -> ArrivedStep | None:
        """Returns the next one, if it need not wait any longer; `with_tokens` has its tokens."""
        if not self._arrived or self._arrived[0].step.awaited_step not in (0, *self._samples):
            return None
        return self._arrived.popleft()

    def with_tokens(self, step: Step) -> Step:
        """Returns a step that need not wait, with all of its tokens, each of its sequence. Raises ProtocolError where
        one was not sampled."""
        if not step.awaited_step:
            return step
        samples = self._samples[step.awaited_step]
        sequences = frame_to_records(step.sequences, STEP_SEQUENCE, None, "Step.sequences")
        tokens = frame_to_array(step.hidden, "int32", (int(sequences["num_tokens"].sum()),), "Step.hidden").copy()
        owners = np.repeat(sequences["sequence_id"], sequences["num_tokens"])
        for row in np.flatnonzero(tokens == AWAITED_TOKEN).tolist():
            token = samples.get(int(owners[row]))
            if token is None:
                raise ProtocolError(f"step {step.awaited_step} has sampled no token of sequence {owners[row]}")
            tokens[row] = token
        return replace(step, hidden=array_to_frame(tokens), awaited_step=0)  # no later stage waits for them
