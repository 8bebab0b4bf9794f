"""Sampling: the right distribution, transformers' filters, and a token that depends on its own row only."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from services.stage.model.logit_adjustments import LogitAdjustments
from services.stage.model.micro_batch import SamplingColumns
from services.stage.model.sampling import ROWS_TOGETHER, SampledTokens, gumbel_noise, sample


def columns(rows: int, **values: Any) -> SamplingColumns:
    """Rows that are all alike, but for those columns that are given as arrays."""
    defaults: dict[str, Any] = {
        "sequence_ids": np.arange(rows),
        "positions": np.arange(rows),
        "temperatures": 1.0,
        "top_ps": 1.0,
        "top_ks": 0,
        "num_top_logprobs": -1,
        "seeds": 7,
        "choices": 0,
    }
    filled: dict[str, Any] = {
        name: np.array(
            np.broadcast_to(
                np.asarray(value, dtype=np.float64 if name in ("temperatures", "top_ps") else np.int64), rows
            )
        )
        for name, value in (defaults | values).items()
    }
    return SamplingColumns(**filled)


def pick(source: SamplingColumns, rows: Any) -> SamplingColumns:
    names = [name for name in SamplingColumns.__slots__ if name not in ("adjustments", "drafts")]
    return SamplingColumns(**{name: getattr(source, name)[rows] for name in names})


def logits_of(rows: int, vocabulary: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(seed)) * scale


def chi_square(counts: np.ndarray[Any, Any], probabilities: np.ndarray[Any, Any]) -> float:
    """Over the tokens that are expected at least five times; the rest in one bin."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    kept = expected > 0
    degrees = int(kept.sum()) - 1
    statistic = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperatures": 0.6},
        {"temperatures": 1.7},
        {"top_ks": 5},
        {"top_ps": 0.8},
        {"temperatures": 0.8, "top_ks": 12, "top_ps": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("varied", ["positions", "seeds", "choices"])
def test_tokens_are_drawn_as_often_as_their_probability_says(varied: str, options: dict[str, float]) -> None:
    draws, vocabulary = 4000, 20
    logits = logits_of(1, vocabulary, seed=3, scale=1.5)
    warped = logits.clone()
    for warper in warpers(options):
        warped = warper(None, warped)
    probabilities = torch.softmax(warped.double(), dim=-1)[0].numpy()
    values = {"positions": 5} | options | {varied: np.arange(draws)}
    drawn = sample(logits.expand(draws, -1), columns(draws, **values))
    counts = np.bincount(drawn.token_ids, minlength=vocabulary)
    assert (counts[probabilities == 0] == 0).all()
    assert abs(chi_square(counts, probabilities)) < 4.5  # standard deviations


def warpers(options: dict[str, float]) -> list[Any]:
    """transformers' own, in the order in which it applies them."""
    made: list[Any] = []
    if "temperatures" in options:
        made.append(TemperatureLogitsWarper(float(options["temperatures"])))
    if "top_ks" in options:
        made.append(TopKLogitsWarper(int(options["top_ks"])))
    if "top_ps" in options:
        made.append(TopPLogitsWarper(float(options["top_ps"])))
    return made


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.1, 5.0),
    top_k=st.integers(1, 40),
    top_p=st.floats(0.05, 0.999),
)
def test_what_can_be_drawn_is_what_transformers_warpers_leave(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    vocabulary, draws = 30, 60
    logits = logits_of(1, vocabulary, seed)
    options = {"temperatures": temperature, "top_ks": min(top_k, vocabulary), "top_ps": top_p}
    warped = logits.clone()
    for warper in warpers(options):
        warped = warper(None, warped)
    allowed = set(torch.isfinite(warped[0]).nonzero()[:, 0].tolist())
    options["top_ks"] = top_k
    drawn = sample(logits.expand(draws, -1), columns(draws, **options, positions=np.arange(draws)))
    assert set(drawn.token_ids.tolist()) <= allowed
    if len(allowed) == 1:
        assert set(drawn.token_ids.tolist()) == allowed


def test_temperature_zero_takes_the_best_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, -1.0, 2.0, 5.0]])
    assert sample(logits, columns(2, temperatures=0.0, top_ks=2, top_ps=0.3)).token_ids.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-44, 5e-324])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    logits = logits_of(6, 50, seed=4)
    for options in ({}, {"top_ps": 0.9}, {"top_ks": 3}):
        drawn = sample(logits, columns(6, temperatures=temperature, **options))
        assert drawn.token_ids.tolist() == logits.argmax(-1).tolist()


def test_a_huge_temperature_draws_from_all() -> None:
    drawn = sample(logits_of(1, 8).expand(400, -1), columns(400, temperatures=1e30))
    assert set(drawn.token_ids.tolist()) == set(range(8))


@pytest.mark.parametrize("options", [{"top_ks": 1}, {"top_ps": 0.0}, {"top_ps": 1e-9}], ids=str)
def test_the_best_token_always_stays(options: dict[str, Any]) -> None:
    logits = logits_of(40, 30, seed=5)
    assert sample(logits, columns(40, **options)).token_ids.tolist() == logits.argmax(-1).tolist()


def assert_same_rows(a: SampledTokens, b: SampledTokens, rows: Any, width: int) -> None:
    assert (a.token_ids[rows] == b.token_ids).all()
    assert (a.logprobs[rows] == b.logprobs).all()
    assert (a.top_token_ids[rows][:, :width] == b.top_token_ids[:, :width]).all()
    assert (a.top_logprobs[rows][:, :width] == b.top_logprobs[:, :width]).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_row_does_not_depend_on_its_batch_mates(data: st.DataObject) -> None:
    rows, vocabulary = data.draw(st.integers(2, 9)), data.draw(st.sampled_from([3, 33, 257]))

    def column(values: Any) -> list[Any]:
        drawn: list[Any] = data.draw(st.lists(values, min_size=rows, max_size=rows))
        return drawn

    whole = columns(
        rows,
        temperatures=column(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        top_ps=column(st.sampled_from([0.2, 0.9, 1.0])),
        top_ks=column(st.sampled_from([0, 1, 2, 300])),
        num_top_logprobs=column(st.integers(-1, 3)),
        seeds=column(st.integers(0, 2**63 - 1)),
        choices=column(st.integers(0, 4)),
        positions=column(st.integers(0, 10_000)),
    )
    logits = logits_of(rows, vocabulary, data.draw(st.integers(0, 100)))
    together = sample(logits, whole)
    row = data.draw(st.integers(0, rows - 1))
    alone = sample(logits[row : row + 1], pick(whole, slice(row, row + 1)))
    assert_same_rows(together, alone, [row], max(0, int(whole.num_top_logprobs[row])))
    order = np.array(data.draw(st.permutations(range(rows))))
    assert_same_rows(together, sample(logits[order], pick(whole, order)), order, together.top_token_ids.shape[1])


def adjustments_of(rows: int, vocabulary: int) -> LogitAdjustments:
    """Each row has a past and biases of its own, as many as its number, in no order of rows."""
    places = np.array([(row, token) for row in range(rows) for token in range(row % vocabulary)])
    np.random.default_rng(3).shuffle(places)
    return LogitAdjustments(
        min_ps=np.arange(rows) / (2 * rows),
        presence_penalties=np.arange(rows) / rows,
        frequency_penalties=np.arange(rows) / (3 * rows),
        repetition_penalties=1 + np.arange(rows) / rows,
        token_counts=np.hstack((places, np.full((len(places), 2), (2, 1)))).astype(np.int32),
        bias_places=places,
        biases=places.sum(axis=1) / vocabulary,
    )


@pytest.mark.parametrize("rows", [ROWS_TOGETHER, ROWS_TOGETHER + 1, 3 * ROWS_TOGETHER - 5])
def test_however_many_rows_there_are_few_are_looked_at_at_a_time_and_no_bit_is_different(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, numbers, heights = 97, np.arange(rows), []
    whole = columns(
        rows,
        temperatures=numbers % 3 * 0.6,
        top_ps=np.where(numbers % 5, 1.0, 0.8),
        top_ks=numbers % 4 * 11,
        num_top_logprobs=numbers % 7 - 1,
        seeds=numbers + 9,
    )
    whole = replace(whole, adjustments=adjustments_of(rows, vocabulary))
    logits = logits_of(rows, vocabulary)
    log_softmax = torch.log_softmax

    def measured(values: Tensor, dim: int) -> Tensor:
        heights.append(len(values))
        return log_softmax(values, dim)

    monkeypatch.setattr(torch, "log_softmax", measured)
    together = sample(logits, whole)
    assert max(heights) <= ROWS_TOGETHER
    for row in range(rows):
        alone = sample(logits[row : row + 1], whole.rows(row, row + 1))
        assert_same_rows(together, alone, [row], alone.top_token_ids.shape[1])


def test_which_of_equally_likely_tokens_are_the_top_ones_does_not_depend_on_what_other_rows_ask_for() -> None:
    logits = logits_of(1, 200, seed=8).round()
    order = sorted(range(200), key=lambda token: (-float(logits[0, token]), token))
    for others in (1, 2, 7, 40, 200):
        both = sample(logits.expand(2, -1), columns(2, num_top_logprobs=[3, others]))
        assert both.top_token_ids[0, :3].tolist() == order[:3]
        assert both.top_token_ids[1, :others].tolist() == order[:others]


def test_seed_choice_position_and_token_each_make_other_noise() -> None:
    def noise(seed: int, choice: int, position: int) -> Any:
        return gumbel_noise(np.array([seed]), np.array([choice]), np.array([position]), 64)[0]

    base = noise(1, 2, 3)
    for other in (noise(2, 2, 3), noise(1, 3, 3), noise(1, 2, 4), noise(2, 1, 3), noise(3, 2, 1)):
        assert not (other == base).any()
    assert len(set(base.tolist())) == 64
    assert (noise(1, 2, 3) == base).all()


def test_a_larger_vocabulary_leaves_the_noise_of_its_first_tokens_alone() -> None:
    keys = np.array([5]), np.array([0]), np.array([9])
    assert (gumbel_noise(*keys, 100)[:, :40] == gumbel_noise(*keys, 40)).all()


def test_noise_is_gumbels() -> None:
    noise = gumbel_noise(np.arange(300), np.zeros(300, np.int64), np.zeros(300, np.int64), 300).ravel()
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.03)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_every_seed_that_fits_the_wire_is_taken(seed: int) -> None:
    assert np.isfinite(gumbel_noise(np.array([seed]), np.array([2**31]), np.array([2**31]), 10)).all()


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = logits_of(4, 30, seed=6)
    wanted = torch.log_softmax(logits, dim=-1)
    drawn = sample(logits, columns(4, temperatures=[0.0, 0.7, 1.0, 2.0], top_ks=3, num_top_logprobs=[0, 5, -1, 2]))
    for row in (0, 1, 3):
        assert drawn.logprobs[row] == wanted[row, drawn.token_ids[row]]
    assert drawn.logprobs[2] == 0.0
    assert drawn.top_token_ids.shape == (4, 5)
    assert drawn.top_token_ids[1].tolist() == wanted[1].topk(5).indices.tolist()
    assert drawn.top_logprobs[3, :2].tolist() == wanted[3].topk(2).values.tolist()


def test_more_top_logprobs_than_tokens_are_filled_up() -> None:
    drawn = sample(logits_of(1, 3), columns(1, num_top_logprobs=5))
    assert drawn.top_logprobs.shape == (1, 5)


def test_bfloat16_logits_are_taken_as_they_are() -> None:
    logits = logits_of(3, 40).to(torch.bfloat16)
    same = sample(logits.float(), columns(3, num_top_logprobs=1))
    assert (sample(logits, columns(3, num_top_logprobs=1)).logprobs == same.logprobs).all()


def test_a_step_in_which_nobody_samples_draws_nothing() -> None:
    drawn = sample(torch.zeros((0, 10)), columns(0))
    assert drawn.token_ids.shape == drawn.logprobs.shape == (0,)
    assert drawn.top_token_ids.shape == (0, 0)
