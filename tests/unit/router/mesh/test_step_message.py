"""What the scheduler decides, as it travels, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.ids import Generation, PipelineId, SequenceId, StepId
from common.messages import NO_PAIRS, Header, Step, StepResult, TensorFrame
from common.wire.array import array_to_frame, frame_to_array
from common.wire.codec import decode, encode
from services.router.engine import SamplingParameters, Token
from services.router.mesh.step_message import computed_by, sampled_tokens, step_header, step_message
from services.router.scheduling.request import count_tokens
from services.router.scheduling.step_plan import ScheduledChunk, StepPlan

GREEDY = SamplingParameters(10, 0.0, 1.0, 0, 3, None, frozenset())
DRAWN = SamplingParameters(10, 0.7, 0.9, 40, 2**63 - 1, 2, frozenset({5}))
PLAIN = SamplingParameters(10, 0.0, 1.0, 0, 3, None, frozenset({5, 6}))
INF = float("inf")


def chunk(
    sequence: int, tokens: int = 1, samples: bool = True, sampling: SamplingParameters = GREEDY, num_drafts: int = 0
) -> ScheduledChunk:
    return ScheduledChunk(
        SequenceId(sequence),
        tuple(range(tokens)),
        4 * sequence,
        sequence % 3,
        (7, 8)[: tokens % 3],
        samples,
        sampling,
        1,
        0,
        num_drafts=num_drafts,
    )


def plan(*chunks: ScheduledChunk, released: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(
        StepId(9), PipelineId(2), Generation(5), tuple(chunks), tuple(SequenceId(sequence) for sequence in released)
    )


def result(sequences: list[int], tokens: list[int], top: list[list[tuple[int, float]]] | None = None) -> StepResult:
    count = len(sequences)
    rows = top if top is not None else [[] for _ in sequences]
    width = max((len(row) for row in rows), default=0)
    ids, logprobs = np.zeros((count, width), np.int32), np.zeros((count, width), np.float32)
    for row, entries in enumerate(rows):
        for column, (token, logprob) in enumerate(entries):
            ids[row, column], logprobs[row, column] = token, logprob
    return StepResult(
        array_to_frame(np.array(sequences, dtype=np.int64)),
        array_to_frame(np.array(tokens, dtype=np.int32)),
        array_to_frame(np.arange(count, dtype=np.float32) - 8),
        array_to_frame(ids),
        array_to_frame(logprobs),
    )


def column(frame: TensorFrame, dtype: str) -> Any:
    return np.frombuffer(frame.data, dtype=dtype).reshape(frame.shape).tolist()


def test_a_step_says_what_its_plan_says() -> None:
    message = step_message(plan(chunk(1, 3, samples=False), chunk(2, 1, sampling=DRAWN), chunk(3, 2), released=(8, 9)))
    assert column(message.hidden, "int32") == [0, 1, 2, 0, 0, 1]
    assert column(message.sequences, "int64") == [[1, 4, 3, 1, 0, 0], [2, 8, 1, 2, 1, 1], [3, 12, 2, 0, 2, 1]]
    assert column(message.new_blocks, "int32") == [7, 7, 8]
    assert column(message.released, "int64") == [8, 9]
    assert column(message.sampling, "float64") == [[0.7, 0.9, 40.0, 2.0], [0.0, 1.0, 0.0, -1.0]]
    assert column(message.seeds, "int64") == [[2**63 - 1, 1], [3, 1]]


def test_a_step_with_drafts_says_how_many_rows_sample_and_what_they_go_on_with() -> None:
    chunks = chunk(1, 4, num_drafts=3), chunk(2, 5, samples=False), chunk(3), chunk(4, 2, num_drafts=1)
    message = step_message(plan(*chunks))
    assert [row[2:6:3] for row in column(message.sequences, "int64")] == [[4, 4], [5, 0], [1, 1], [2, 2]]
    assert column(message.drafts, "int32") == [1, 2, 3, 1]
    assert column(message.seeds, "int64") == [[3, 1]] * 3, "one row a sequence"


def test_a_step_without_chunks_has_all_its_columns() -> None:
    message = step_message(plan(released=(4,)))
    assert message.hidden.shape == message.new_blocks.shape == (0,)
    assert (message.sequences.shape, message.sampling.shape, message.seeds.shape) == ((0, 6), (0, 4), (0, 2))


def test_the_header_fences_the_step() -> None:
    header = step_header(plan(chunk(1)), 3, 1500)
    assert header == Header(router_term=3, generation=5, step=9, time_left_ms=1500, trace="2/9")


@settings(deadline=None)
@given(chunks=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9), st.booleans(), st.booleans()), max_size=6))
def test_every_plan_passes_the_codec(chunks: list[tuple[int, int, bool, bool]]) -> None:
    made = plan(
        *(
            chunk(sequence, tokens, samples, num_drafts=tokens - 1 if drafts and samples else 0)
            for sequence, tokens, samples, drafts in chunks
        )
    )
    message = step_message(made)
    decoded, header = decode([bytes(frame) for frame in encode(message, step_header(made, 1, 2))])
    assert header.step == 9
    assert decoded == replace(
        message,
        **{
            name: replace(getattr(message, name), data=bytes(getattr(message, name).data))
            for name in type(message).__slots__
            if isinstance(getattr(message, name), TensorFrame)
        },
    )


def test_an_answer_with_too_many_tokens_is_refused_before_any_is_looked_at() -> None:
    answer = replace(result([9] * 5, [5] * 5), token_ids=array_to_frame(np.full(4, -1, np.int64)))
    with pytest.raises(ProtocolError, match="has 5 tokens, the step asked for 4 at most"):
        sampled_tokens(answer, plan(chunk(1), chunk(2, samples=False), chunk(3, 3, num_drafts=2)), 100)


def test_tokens_come_back_by_sequence_in_any_order() -> None:
    step = plan(
        chunk(1),
        chunk(2, samples=False),
        chunk(3, sampling=DRAWN),
        chunk(4, sampling=replace(DRAWN, num_top_logprobs=0)),
    )
    answer = result([4, 1, 3], [11, 12, 13], [[(1, -0.5), (2, -1.0)], [(3, -0.5)], [(4, -0.25), (5, -2.0), (6, -3.0)]])
    assert sampled_tokens(answer, step, 100) == {
        1: (Token(12),),
        3: (Token(13, -6.0, ((4, -0.25), (5, -2.0))),),
        4: (Token(11, -8.0, ()),),
    }


@pytest.mark.parametrize(
    "answer",
    [
        result([], []),
        result([1], [5]),
        result([1, 2], [5, 6]),
        result([1, 3, 3], [5, 6, 7]),
        result([1, 3, 4], [5, 6, 7]),
        result([1, 3], [5, 100]),
        result([1, 3], [-1, 5]),
        replace(result([1, 3], [5, 6]), token_ids=array_to_frame(np.zeros(3, np.int32))),
        replace(result([1, 3], [5, 6]), token_ids=array_to_frame(np.zeros(2, np.int64))),
        replace(result([1, 3], [5, 6]), logprobs=array_to_frame(np.zeros((2, 1), np.float32))),
        replace(result([1, 3], [5, 6]), top_token_ids=array_to_frame(np.zeros((2, 3), np.int32))),
        replace(result([1, 3], [5, 6]), top_logprobs=array_to_frame(np.zeros((1, 0), np.float32))),
    ],
)
def test_an_answer_that_does_not_fit_its_plan_is_a_protocol_error(answer: StepResult) -> None:
    with pytest.raises(ProtocolError):
        sampled_tokens(answer, plan(chunk(1), chunk(2, samples=False), chunk(3)), 100)


def test_drafts_that_were_right_come_back_with_the_token_behind_them() -> None:
    step = plan(chunk(1, 4, num_drafts=3), chunk(2), chunk(3, 3, num_drafts=2, sampling=DRAWN))  # drafts: 1, 2, 3; 1, 2
    top = [[(number, -1.0), (number + 1, -2.0)] for number in range(5)]
    answer = result([1, 1, 2, 3, 3], [1, 7, 8, 1, 9], top)
    drawn = sampled_tokens(answer, step, 100)
    assert {sequence: [token.token_id for token in tokens] for sequence, tokens in drawn.items()} == {
        1: [1, 7],
        2: [8],
        3: [1, 9],
    }
    assert [token.logprob for token in drawn[SequenceId(3)]] == [-5.0, -4.0]
    assert [token.top_logprobs[0][0] for token in drawn[SequenceId(3)]] == [3, 4]
    all_right = sampled_tokens(result([1, 1, 1, 1, 2, 3], [1, 2, 3, 4, 8, 5], top + top[:1]), step, 100)
    assert [token.token_id for token in all_right[SequenceId(1)]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param([1], id="the first draft is right, and nothing follows it"),
        pytest.param([1, 2], id="so is the second one"),
        pytest.param([5, 6], id="a token behind a wrong draft"),
        pytest.param([1, 3, 4], id="a draft that was not made"),
        pytest.param([1, 2, 3, 4], id="more tokens than there are drafts and one"),
    ],
)
def test_an_answer_that_contradicts_its_drafts_is_a_protocol_error(tokens: list[int]) -> None:
    with pytest.raises(ProtocolError, match="draft"):
        sampled_tokens(result([1] * len(tokens), tokens), plan(chunk(1, 3, num_drafts=2)), 100)


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), float("-inf")])
def test_a_logprob_that_json_cannot_carry_is_a_protocol_error(logprob: float) -> None:
    answer = replace(
        result([3], [5], [[(1, -1.0), (2, -2.0)]]), logprobs=array_to_frame(np.array([logprob], np.float32))
    )
    with pytest.raises(ProtocolError, match="logprob"):
        sampled_tokens(answer, plan(chunk(3, sampling=DRAWN)), 100)


def test_fewer_top_logprobs_than_asked_for_are_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="top"):
        sampled_tokens(result([3], [5], [[(1, -1.0)]]), plan(chunk(3, sampling=DRAWN)), 100)


def test_sequences_that_went_on_without_an_expert_are_marked() -> None:
    step = plan(chunk(1), chunk(2))
    flags = array_to_frame(np.array([1, 0], dtype=np.uint8))
    marked = replace(result([2, 1], [11, 12]), degraded=flags)
    assert {number: token.degraded for number, (token,) in sampled_tokens(marked, step, 20).items()} == {
        2: False,
        1: True,
    }
    plain = sampled_tokens(result([2, 1], [11, 12]), step, 20)
    assert not any(token.degraded for (token,) in plain.values())
    wrong = replace(marked, degraded=array_to_frame(np.array([1], dtype=np.uint8)))
    with pytest.raises(ProtocolError, match="degraded"):
        sampled_tokens(wrong, step, 20)


def adjusted(
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
    return step_message(StepPlan(StepId(1), PipelineId(0), Generation(1), chunks, ()))


def test_rows_without_penalties_cost_nothing() -> None:
    step = message(adjusted(PLAIN), adjusted(PLAIN, 4))
    assert (step.penalties.shape, step.token_counts.shape, step.biases.shape) == ((0, 5), (0, 4), (0, 3))


def test_each_row_says_its_own_and_rows_are_counted_over_those_that_sample() -> None:
    counts = count_tokens([4], [9, 9])
    asking = replace(PLAIN, repetition_penalty=1.5, presence_penalty=0.25)
    step = message(
        adjusted(asking, samples=False),
        adjusted(replace(PLAIN, min_p=0.1)),
        adjusted(PLAIN),
        adjusted(asking, 2, counts),
    )
    assert rows(step.penalties) == [[0, 0.1, 0, 0, 1], [2, 0, 0.25, 0, 1.5]]
    assert rows(step.token_counts) == [[2, 4, 0, 1], [2, 9, 2, 0]]
    assert rows(step.adjusted) == [[0, 0, 1], [2, 2, 1]]


def test_a_row_that_goes_on_says_only_how_far_it_is() -> None:
    asking = replace(PLAIN, repetition_penalty=1.5, logit_bias=((5, 1.0),))
    step = message(adjusted(PLAIN, 3, tells=False), adjusted(asking, 3, tells=False))
    assert rows(step.adjusted) == [[1, 3, 0]]
    assert (step.penalties.shape, step.token_counts.shape, step.biases.shape) == ((0, 5), (0, 4), (0, 3))


def test_stop_tokens_are_forbidden_until_min_tokens_are_there() -> None:
    asking = replace(PLAIN, min_tokens=2, logit_bias=((5, 1.0), (8, -3.0)))
    assert sorted(rows(message(adjusted(PLAIN), adjusted(asking, 1)).biases)) == [
        [1, 5, -INF],
        [1, 6, -INF],
        [1, 8, -3],
    ]
    assert rows(message(adjusted(PLAIN), adjusted(asking, 2)).biases) == [[1, 5, 1], [1, 8, -3]]


def test_a_table_of_stop_tokens_is_made_once_for_all_choices_and_steps() -> None:
    asking = replace(PLAIN, min_tokens=3)
    first, again = message(adjusted(asking)), message(adjusted(asking, 1), adjusted(asking, 2))
    assert asking.early_bias_table is asking.early_bias_table
    assert sorted(rows(first.biases)) == [[0, 5, -INF], [0, 6, -INF]]
    assert sorted(rows(again.biases)) == [[row, token_id, -INF] for row in (0, 1) for token_id in (5, 6)]


def test_what_comes_back_by_a_copy_is_told_apart_from_what_is_computed() -> None:
    restored = replace(chunk(2, 8, samples=False), block_offset=0, new_block_ids=(7, 8), tier_slots=(3, 1))
    made = replace(plan(restored, chunk(1)), saves=((7, 0),))
    message, _ = decode(encode(step_message(made), Header()))
    assert isinstance(message, Step)
    assert frame_to_array(message.hidden, "int32", (None,), "hidden").tolist() == [0]
    assert frame_to_array(message.sequences, "int64", (1, 6), "sequences")[0, 0] == 1
    assert frame_to_array(message.new_blocks, "int32", (None,), "new_blocks").tolist() == [7]
    assert frame_to_array(message.saves, "int32", (None, 2), "saves").tolist() == [[7, 0]]
    assert frame_to_array(message.restores, "int32", (None, 2), "restores").tolist() == [[3, 7], [1, 8]]
    answer = replace(result([1], [4]), degraded=array_to_frame(np.ones(1, dtype=np.uint8)))
    assert computed_by(answer, made).degraded == {1}
    assert step_message(plan(chunk(1))).restores == NO_PAIRS
