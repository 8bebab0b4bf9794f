from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ids import PipelineId, SequenceId, StepId
from services.router.engine import FinishReason, Token
from services.router.scheduling.request import Request, RequestState, count_tokens
from tests.support.router.simulated_pipeline import build_request

TOKENS = st.lists(st.integers(0, 300), max_size=400)


def waiting_request(prompt_length: int = 4, max_tokens: int = 3, stop: int | None = None) -> Request:
    stop_token_ids = frozenset() if stop is None else frozenset({stop})
    generation_request = build_request("a", prompt_length, max_tokens, stop_token_ids=stop_token_ids)
    return Request(generation_request, arrival=1, arrived_s=0.0)


def sampled(token_id: int) -> Token:
    return Token(token_id, -0.5, ((token_id, -0.5),))


def test_last_token_finishes_by_length() -> None:
    request = waiting_request(max_tokens=2)
    request.start(PipelineId(0), SequenceId(1), 0.0)
    first, last = request.accept_token(sampled(7)), request.accept_token(sampled(8))
    assert (first.finish_reason, last.finish_reason) == (None, FinishReason.LENGTH)
    assert (last.token_id, last.logprob, last.top_logprobs) == (8, -0.5, ((8, -0.5),))
    assert request.state is RequestState.FINISHED


def test_stop_token_finishes_and_is_handed_on() -> None:
    request = waiting_request(stop=9)
    request.start(PipelineId(0), SequenceId(1), 0.0)
    token = request.accept_token(sampled(9))
    assert (token.token_id, token.finish_reason) == (9, FinishReason.STOP)


def test_stop_token_at_the_limit_is_a_stop() -> None:
    request = waiting_request(max_tokens=1, stop=9)
    request.start(PipelineId(0), SequenceId(1), 0.0)
    assert request.accept_token(sampled(9)).finish_reason is FinishReason.STOP


def test_requeued_request_keeps_tokens_and_place_and_loses_its_cache() -> None:
    request = waiting_request()
    request.start(PipelineId(0), SequenceId(1), 0.0)
    request.accept_token(sampled(7))
    request.num_computed_tokens = 4
    request.requeue(5.0)
    assert (request.state, request.generated_token_ids, request.arrival) == (RequestState.WAITING, [7], 1)
    assert (request.num_computed_tokens, request.num_remaining_tokens, request.sequence_id) == (0, 5, None)


def test_request_that_still_holds_something_cannot_be_requeued() -> None:
    request = waiting_request()
    request.start(PipelineId(0), SequenceId(1), 0.0)
    request.steps = {StepId(1): 1}
    with pytest.raises(ValueError, match="still holds"):
        request.requeue(0.0)
    request.steps, request.block_table = {}, [0]
    with pytest.raises(ValueError, match="still holds"):
        request.requeue(0.0)


def test_tokens_run_over_from_the_prompt_into_the_generated() -> None:
    request = waiting_request(prompt_length=4)
    request.start(PipelineId(0), SequenceId(1), 0.0)
    request.accept_token(sampled(50))
    request.accept_token(sampled(51))
    prompt = request.generation_request.prompt_token_ids
    assert request.token_ids(2, 5) == (*prompt[2:], 50)
    assert request.token_ids(5, 6) == (51,)
    assert request.token_ids(0, 6) == (*prompt, 50, 51)


@pytest.mark.parametrize("end", [RequestState.CANCELLED, RequestState.FAILED])
def test_end_is_final(end: RequestState) -> None:
    request = waiting_request()
    request.end(end)
    for state in (RequestState.CANCELLED, RequestState.FAILED):
        with pytest.raises(ValueError, match="cannot become"):
            request.end(state)
    with pytest.raises(ValueError, match="cannot become"):
        request.start(PipelineId(0), SequenceId(1), 0.0)
    with pytest.raises(ValueError, match="takes no token"):
        request.accept_token(sampled(1))


@given(TOKENS, TOKENS)
def test_each_token_stands_there_once_with_how_often_it_was_generated(prompt: list[int], generated: list[int]) -> None:
    rows = np.frombuffer(count_tokens(prompt, generated), dtype=np.int32).reshape(-1, 3).tolist()
    times = Counter(generated)
    wanted = {token_id: (times[token_id], int(token_id in prompt)) for token_id in {*prompt, *generated}}
    assert {token_id: (count, in_prompt) for token_id, count, in_prompt in rows} == wanted
    assert len(rows) == len(wanted)
