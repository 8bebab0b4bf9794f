"""Penalties and biases as a step carries them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from common.ids import Generation, PipelineId, SequenceId, StepId
from common.messages import TensorFrame
from services.router.engine import SamplingParameters
from services.router.mesh.step_message import step_message
from services.router.scheduling.step_plan import ScheduledChunk, StepPlan
from services.router.scheduling.token_counts import count_tokens

PLAIN = SamplingParameters(10, 0.0, 1.0, 0, 3, None, frozenset({5, 6}))
INF = float("inf")


def chunk(
    sampling: SamplingParameters,
    num_generated: int = 0,
    counts: bytes = b"",
    samples: bool = True,
    tells: bool = True,
) -> Any:
    return ScheduledChunk(SequenceId(1), (1,), 0, 0, (1,), samples, sampling, 0, num_generated, tells, counts)


def rows(frame: TensorFrame) -> list[list[float]]:
    values: list[list[float]] = np.frombuffer(frame.data, dtype=frame.dtype).reshape(frame.shape).tolist()
    return values


def message(*chunks: ScheduledChunk) -> Any:
    return step_message(StepPlan(StepId(1), PipelineId(0), Generation(1), 0, chunks, ()))


def test_rows_without_penalties_cost_nothing() -> None:
    step = message(chunk(PLAIN), chunk(PLAIN, 4))
    assert (step.penalties.shape, step.token_counts.shape, step.biases.shape) == ((0, 5), (0, 4), (0, 3))


def test_each_row_says_its_own_and_rows_are_counted_over_those_that_sample() -> None:
    counts = count_tokens([4], [9, 9])
    asking = replace(PLAIN, repetition_penalty=1.5, presence_penalty=0.25)
    step = message(
        chunk(asking, samples=False),
        chunk(replace(PLAIN, min_p=0.1)),
        chunk(PLAIN),
        chunk(asking, 2, counts),
    )
    assert rows(step.penalties) == [[0, 0.1, 0, 0, 1], [2, 0, 0.25, 0, 1.5]]
    assert rows(step.token_counts) == [[2, 4, 0, 1], [2, 9, 2, 0]]
    assert rows(step.adjusted) == [[0, 0, 1], [2, 2, 1]]


def test_a_row_that_goes_on_says_only_how_far_it_is() -> None:
    asking = replace(PLAIN, repetition_penalty=1.5, logit_bias=((5, 1.0),))
    step = message(chunk(PLAIN, 3, tells=False), chunk(asking, 3, tells=False))
    assert rows(step.adjusted) == [[1, 3, 0]]
    assert (step.penalties.shape, step.token_counts.shape, step.biases.shape) == ((0, 5), (0, 4), (0, 3))


def test_stop_tokens_are_forbidden_until_min_tokens_are_there() -> None:
    asking = replace(PLAIN, min_tokens=2, logit_bias=((5, 1.0), (8, -3.0)))
    assert sorted(rows(message(chunk(PLAIN), chunk(asking, 1)).biases)) == [[1, 5, -INF], [1, 6, -INF], [1, 8, -3]]
    assert rows(message(chunk(PLAIN), chunk(asking, 2)).biases) == [[1, 5, 1], [1, 8, -3]]


def test_a_table_of_stop_tokens_is_made_once_for_all_choices_and_steps() -> None:
    asking = replace(PLAIN, min_tokens=3)
    first, again = message(chunk(asking)), message(chunk(asking, 1), chunk(asking, 2))
    assert asking.early_bias_table is asking.early_bias_table
    assert sorted(rows(first.biases)) == [[0, 5, -INF], [0, 6, -INF]]
    assert sorted(rows(again.biases)) == [[row, token_id, -INF] for row in (0, 1) for token_id in (5, 6)]
