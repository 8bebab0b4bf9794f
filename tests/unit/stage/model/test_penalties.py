"""Penalties, biases and min_p: transformers' and vLLM's formulas, a row's own bits, and the same token after a move."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from common.ids import Generation, PipelineId, RequestId, SequenceId, StepId
from common.messages import Step
from services.router.engine import GenerationRequest, SamplingParameters, Token
from services.router.mesh.step_message import step_message
from services.router.scheduling.request import Request
from services.router.scheduling.step_plan import ScheduledChunk, StepPlan
from services.stage.model.logit_adjustments import KeptAdjustments, adjusted_logits, without_unlikely
from services.stage.model.micro_batch import BlockTables, read_micro_batch
from services.stage.model.sampling import SampledTokens, sample

VOCABULARY = 40
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)
GREEDY = SamplingParameters(10_000, 0.0, 1.0, 0, 3, 5, frozenset({1, 2}))
SAMPLINGS = st.builds(
    replace,
    st.just(GREEDY),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([0.9, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.sampled_from([(), ((3, 5.0), (9, -100.0))]),
    min_tokens=st.integers(0, 6),
)


def logits_of(rows: int, seed: int) -> Tensor:
    return torch.randn((rows, VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 3


def request_of(sampling: SamplingParameters, prompt: list[int], generated: list[int]) -> Request:
    """As a new router has it from its journal: all tokens at once."""
    made = Request(GenerationRequest(RequestId("r"), tuple(prompt), sampling, 1), 1, 0.0)
    made.start(PipelineId(0), SequenceId(4), 0.0)
    made.generated_token_ids.extend(generated)
    return made


def next_step(*requests: Request, tells: bool = True) -> Step:
    """The step that computes all tokens of each request and samples the next one; told anew if `tells`."""
    chunks = [
        ScheduledChunk(
            sequence_id=SequenceId(number),
            token_ids=request.token_ids(0, request.num_tokens),
            start_position=0,
            block_offset=0,
            new_block_ids=tuple(range(-(-request.num_tokens // 32))),
            samples=True,
            sampling=request.generation_request.sampling,
            choice=request.generation_request.choice,
            num_generated=len(request.generated_token_ids),
            tells_adjustments=request.tells_adjustments(len(request.generated_token_ids)) or tells,
            token_counts=request.token_counts(),
        )
        for number, request in enumerate(requests)
    ]
    return step_message(StepPlan(StepId(1), PipelineId(0), Generation(1), tuple(chunks), ()))


def draw(step: Step, logits: Tensor, kept: KeptAdjustments | None = None) -> SampledTokens:
    hidden = torch.zeros(step.hidden.shape, dtype=torch.int64)
    kept = KeptAdjustments() if kept is None else kept
    columns = read_micro_batch(step, hidden, BlockTables(32, 100), kept).sampling
    assert columns is not None
    drawn = sample(logits, columns)
    kept.count(columns.sequence_ids.tolist(), drawn.token_ids.tolist())
    return drawn


def adjusted(step: Step, logits: Tensor) -> Tensor:
    adjustments = KeptAdjustments().apply(step, np.arange(len(logits)))
    return logits if adjustments is None else adjusted_logits(logits, adjustments)


@given(TOKENS, TOKENS, st.floats(0.1, 4.0), st.integers(0, 99))
def test_repetition_penalty_is_transformers(prompt: list[int], generated: list[int], penalty: float, seed: int) -> None:
    logits = logits_of(1, seed)
    oracle = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + generated]), logits.clone())
    step = next_step(request_of(replace(GREEDY, repetition_penalty=penalty), prompt, generated))
    assert torch.allclose(adjusted(step, logits), oracle, rtol=1e-6, atol=0)


@given(TOKENS, TOKENS, st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 99))
def test_presence_and_frequency_are_openais_formula(
    prompt: list[int], generated: list[int], presence: float, frequency: float, seed: int
) -> None:
    logits = logits_of(1, seed)
    times = Counter(generated)
    oracle = logits[0].double().clone()
    for token_id, count in times.items():
        oracle[token_id] -= count * frequency + presence
    sampling = replace(GREEDY, presence_penalty=presence, frequency_penalty=frequency)
    step = next_step(request_of(sampling, prompt, generated))
    assert torch.allclose(adjusted(step, logits)[0].double(), oracle, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.floats(0.001, 1.0), st.sampled_from([0.3, 1.0, 2.0]), st.integers(0, 99))
def test_min_p_leaves_what_transformers_leaves(min_p: float, temperature: float, seed: int) -> None:
    scaled = logits_of(3, seed) / temperature
    probabilities = torch.softmax(scaled.double(), dim=-1)
    edge = probabilities.max(dim=-1, keepdim=True).values * min_p
    clear = (probabilities / edge - 1).abs() > 1e-5  # closer to the edge, rounding may decide
    no_ids: Any = None
    left = torch.isfinite(without_unlikely(scaled, np.full(3, min_p)))
    assert torch.equal(left[clear], torch.isfinite(MinPLogitsWarper(min_p)(no_ids, scaled.clone()))[clear])


def test_order_is_bias_repetition_frequency_presence() -> None:
    sampling = replace(
        GREEDY, logit_bias=((5, 4.0),), repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25
    )
    step = next_step(request_of(sampling, [5], [5, 5]))
    logits = torch.full((1, VOCABULARY), -2.0)
    assert adjusted(step, logits)[0, 5].item() == (-2.0 + 4.0) / 2.0 - 2 * 0.5 - 0.25
    assert adjusted(step, logits)[0, 4].item() == -2.0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_rows_bits_do_not_depend_on_its_batch_mates(data: st.DataObject) -> None:
    requests = [
        request_of(data.draw(SAMPLINGS), data.draw(TOKENS), data.draw(TOKENS))
        for _ in range(data.draw(st.integers(2, 5)))
    ]
    logits = logits_of(len(requests), data.draw(st.integers(0, 99)))
    step = next_step(*requests)
    together, whole = draw(step, logits), adjusted(step, logits)
    for row, request in enumerate(requests):
        alone = next_step(request)
        drawn = draw(alone, logits[row : row + 1])
        assert torch.equal(adjusted(alone, logits[row : row + 1])[0], whole[row])
        assert drawn.token_ids[0] == together.token_ids[row]
        assert drawn.logprobs[0] == together.logprobs[row]


@settings(max_examples=30, deadline=None)
@given(sampling=SAMPLINGS, prompt=TOKENS, cut=st.integers(0, 12), salt=st.integers(0, 99))
def test_a_sequence_recomputed_from_its_tokens_so_far_draws_the_same_next_ones(
    sampling: SamplingParameters, prompt: list[int], cut: int, salt: int
) -> None:
    """A "model" whose logits depend on all tokens; one request lives through, the other begins anew at `cut`, and a
    third is told everything with each step."""

    def step_on(request: Request, kept: KeptAdjustments | None) -> None:
        tokens = request.token_ids(0, request.num_tokens)
        step = next_step(request, tells=kept is None)
        drawn = draw(step, logits_of(1, hash((tokens, salt)) % 2**31), kept)
        request.accept_token(Token(int(drawn.token_ids[0]), float(drawn.logprobs[0]), ()))

    unending = replace(sampling, stop_token_ids=frozenset())
    lived, kept = request_of(unending, prompt, []), KeptAdjustments()
    for _ in range(12):
        step_on(lived, kept)
    for holder in (KeptAdjustments(), None):
        restored = request_of(unending, prompt, lived.generated_token_ids[:cut])
        while len(restored.generated_token_ids) < 12:
            step_on(restored, holder)
        assert restored.generated_token_ids == lived.generated_token_ids


def test_a_penalty_changes_what_is_drawn() -> None:
    """Else the test above could not fail."""
    logits = torch.zeros((1, VOCABULARY))
    logits[0, 7], logits[0, 8] = 2.0, 1.5
    plain, asking = request_of(GREEDY, [3], [7]), request_of(replace(GREEDY, presence_penalty=1.0), [3], [7])
    assert draw(next_step(plain), logits).token_ids.tolist() == [7]
    assert draw(next_step(asking), logits).token_ids.tolist() == [8]


def test_stop_tokens_cannot_be_drawn_before_min_tokens() -> None:
    logits = torch.zeros((1, VOCABULARY))
    logits[0, 1] = 50.0
    for temperature in (0.0, 1.0):
        sampling = replace(GREEDY, temperature=temperature, min_tokens=2)
        assert draw(next_step(request_of(sampling, [3], [7])), logits).token_ids.tolist() != [1]
        assert draw(next_step(request_of(sampling, [3], [7, 7])), logits).token_ids.tolist() == [1]


@settings(max_examples=30, deadline=None)
@given(SAMPLINGS, TOKENS, TOKENS, st.integers(0, 99))
def test_logprobs_stay_those_of_the_models_own_distribution(
    sampling: SamplingParameters, prompt: list[int], generated: list[int], seed: int
) -> None:
    logits = logits_of(1, seed)
    kept = logits.clone()
    drawn: Any = draw(next_step(request_of(sampling, prompt, generated)), logits)
    own = torch.log_softmax(kept, dim=-1)
    assert torch.equal(logits, kept), "the model's logits are not written to"
    assert drawn.logprobs[0] == own[0, drawn.token_ids[0]]
    assert drawn.top_logprobs[0].tolist() == own[0].topk(5).values.tolist()


def test_a_tiny_penalty_and_temperature_leave_a_best_token() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    sampling = replace(GREEDY, temperature=1e-44, repetition_penalty=1e-300, top_p=0.9)
    assert draw(next_step(request_of(sampling, [0, 1], [2])), logits).token_ids.tolist()[0] in (0, 1, 2)
