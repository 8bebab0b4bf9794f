"""What the last stage sends on: of drafts, those that were right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from common.ids import Generation, PipelineId, SequenceId, StepId
from common.messages import Header, StepResult
from common.wire.array import frame_to_array
from services.router.engine import SamplingParameters
from services.router.mesh.step_message import sampled_tokens, step_message
from services.router.scheduling.step_plan import ScheduledChunk, StepPlan
from services.stage.model.executor import Finished, RunningBatch
from services.stage.model.logit_adjustments import KeptAdjustments
from services.stage.model.micro_batch import BlockTables, read_micro_batch
from services.stage.step_output import passed_on

VOCABULARY = 20
PENALISED = SamplingParameters(50, 0.0, 1.0, 0, 0, 1, frozenset(), frequency_penalty=0.5)


def chunk(
    sequence: int, token_ids: tuple[int, ...], num_drafts: int, num_generated: int, tells: bool
) -> ScheduledChunk:
    return ScheduledChunk(
        SequenceId(sequence), token_ids, num_generated, 0, (sequence,), True, PENALISED, 0, num_generated, tells,
        num_drafts=num_drafts,
    )  # fmt: skip


def plan(*chunks: ScheduledChunk) -> StepPlan:
    return StepPlan(StepId(1), PipelineId(0), Generation(1), tuple(chunks), ())


def last_stage() -> Any:
    return SimpleNamespace(
        role=SimpleNamespace(is_last=True),
        adjustments=KeptAdjustments(),
        sampling_kernels=None,
        tables=BlockTables(32, 9),
    )


def result_of(stage: Any, step_plan: StepPlan, best: list[int]) -> StepResult:
    """Of a step whose rows have these tokens as their likeliest ones, by far."""
    step = step_message(step_plan)
    hidden = torch.zeros(step.hidden.shape, dtype=torch.int64)
    batch = read_micro_batch(step, hidden, stage.tables, stage.adjustments)
    logits = torch.zeros((len(best), VOCABULARY))
    logits[torch.arange(len(best)), torch.tensor(best)] = 90.0
    running = RunningBatch(step, Header(), 9.0, batch, iter(()), frozenset())  # type: ignore[arg-type]
    result = passed_on(stage, Finished(running, logits), 1)
    assert isinstance(result, StepResult)
    return result


def test_the_tokens_up_to_the_first_wrong_draft_are_sent_and_counted() -> None:
    stage = last_stage()
    first = plan(chunk(1, (3, 4, 5, 6), 3, 2, tells=True), chunk(2, (7,), 0, 2, tells=True))
    result = result_of(stage, first, [4, 5, 9, 8, 10])  # of the first sequence's last row nothing comes
    assert frame_to_array(result.sequence_ids, "int64", (None,), "ids").tolist() == [1, 1, 1, 2]
    drawn = sampled_tokens(result, first, VOCABULARY)
    assert {number: [token.token_id for token in tokens] for number, tokens in drawn.items()} == {1: [4, 5, 9], 2: [10]}
    assert all(token.logprob == 0 and token.top_logprobs[0][0] == token.token_id for token in drawn[SequenceId(1)])
    again = plan(chunk(1, (9, 4), 1, 5, tells=False), chunk(2, (10,), 0, 3, tells=False))
    stage.tables = BlockTables(32, 9)
    result_of(stage, again, [4, 4, 4])  # which the last stage refuses if it has counted otherwise
    kept = stage.adjustments.apply(step_message(plan(chunk(1, (4,), 0, 7, tells=False))), np.array([1]))
    assert sorted(kept.token_counts[:, 1:3].tolist()) == [[4, 3], [5, 1], [9, 1]]


def test_all_drafts_may_be_right() -> None:
    step = plan(chunk(1, (3, 4, 5), 2, 2, tells=True))
    drawn = sampled_tokens(result_of(last_stage(), step, [4, 5, 6]), step, VOCABULARY)
    assert [token.token_id for token in drawn[SequenceId(1)]] == [4, 5, 6]
