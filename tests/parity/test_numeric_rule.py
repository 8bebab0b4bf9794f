"""A row's bits depend on its tokens, positions and weights, and on nothing else: not on company, chunks or layout."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.checkpoints.prompts import random_prompts
from tests.support.checkpoints.shelf import Shelf
from tests.support.checkpoints.tiny_checkpoints import MIXTRAL_BF16, QWEN3_TIED_SHARDED_BF16, Recipe
from tests.support.processes.waiting import wait_until
from tests.support.served.drafting_router import modules_for
from tests.support.served.fault_runs import metric
from tests.support.served.mesh_client import Answer, Ask, MeshClient
from tests.support.served.served_mesh import served_mesh

pytestmark = pytest.mark.parity
LENGTHS = (1, 3, 16, 17, 31, 64, 65, 100, 130, 200, 257, 400, 5, 9, 48, 300)
MAX_TOKENS = 12


@dataclass(frozen=True)
class Layout:
    """A mesh other than the plain one, which has one stage and one expert process."""

    name: str
    settings: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


PLAIN = Layout("plain", {"PP": "1", "EXPERTS": "1", "PREFILL_CHUNK_TOKENS": "64"})
ALL_OTHER = Layout(
    "all-at-once",
    {
        "PP": "3",
        "TP": "2",
        "EXPERTS": "3",
        "PREFILL_CHUNK_TOKENS": "16",
        "MAX_BATCH_SEQUENCES": "5",
        "MAX_BATCH_TOKENS": "96",
    },
)
ONE_BY_ONE = (
    Layout("two-stages", PLAIN.settings | {"PP": "2"}),
    Layout("three-stages", PLAIN.settings | {"PP": "3"}),
    Layout("three-experts", PLAIN.settings | {"EXPERTS": "3"}),
    Layout("three-experts-one-copy", PLAIN.settings | {"EXPERTS": "3", "COPIES": "1"}),
    Layout("chunks-of-16", PLAIN.settings | {"PREFILL_CHUNK_TOKENS": "16"}),
    Layout("chunks-of-256", PLAIN.settings | {"PREFILL_CHUNK_TOKENS": "256"}),
    Layout("two-sequences-a-batch", PLAIN.settings | {"MAX_BATCH_SEQUENCES": "2"}),
    Layout("small-batches", PLAIN.settings | {"MAX_BATCH_TOKENS": "40"}),
    Layout("two-pipelines", PLAIN.settings | {"STAGES": "2"}),
    Layout("two-ranks", PLAIN.settings | {"TP": "2"}),
    Layout("four-ranks", PLAIN.settings | {"TP": "4"}),
    *(
        Layout(
            f"pp{pp}-tp{tp}-experts{experts}-gloo",
            PLAIN.settings | {"PP": str(pp), "TP": str(tp), "EXPERTS": str(experts), "TP_COLLECTIVES": "gloo"},
        )
        for pp, tp, experts in itertools.product((1, 2), (2, 4), (1, 3))
    ),
)
RECIPES = (QWEN3_TIED_SHARDED_BF16, MIXTRAL_BF16)
DTYPES = ("float32", "bfloat16")


def asks(vocabulary: int) -> list[Ask]:
    """32 different ones: each prompt greedy and sampled at temperature 1 with a seed of its own."""
    prompts = random_prompts(vocabulary, seed=11, lengths=LENGTHS)
    greedy = [Ask(prompt, MAX_TOKENS, num_top_logprobs=2, ignore_eos=True) for prompt in prompts]
    sampled = [
        Ask(prompt, MAX_TOKENS, temperature=1.0, seed=seed, num_top_logprobs=2, ignore_eos=True)
        for seed, prompt in enumerate(prompts)
    ]
    return greedy + sampled


@dataclass(frozen=True)
class PlainAnswers:
    """Of the plain mesh: every second one asked alone, then all at once."""

    checkpoint: Path
    dtype: str
    asks: list[Ask]
    alone: list[Answer]
    together: list[Answer]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((recipe, dtype), id=f"{recipe.family}-{dtype}", marks=[] if quick else [pytest.mark.slow])
        for recipe, dtype, quick in (
            (RECIPES[0], DTYPES[0], True),
            (RECIPES[1], DTYPES[1], True),
            (RECIPES[0], DTYPES[1], False),
            (RECIPES[1], DTYPES[0], False),
        )
    ],
)
def plain(request: pytest.FixtureRequest, shelf: Shelf) -> PlainAnswers:
    recipe: Recipe
    recipe, dtype = request.param
    checkpoint = shelf.checkpoint(recipe)
    wanted = asks(shelf.reference(recipe).vocabulary)
    with served_mesh(checkpoint, {"DTYPE": dtype, **PLAIN.settings}) as mesh:
        alone = [mesh.client.ask(ask) for ask in wanted[::2]]
        return PlainAnswers(checkpoint, dtype, wanted, alone, mesh.client.ask_all(wanted))


def assert_same_bits(client: MeshClient, plain: PlainAnswers) -> None:
    assert [client.ask(ask) for ask in plain.asks[::8]] == plain.together[::8]
    # Other neighbours in each batch than the plain mesh's.
    assert client.ask_all(plain.asks[::-1]) == plain.together[::-1]


def test_company_changes_no_bit(plain: PlainAnswers) -> None:
    assert plain.together[::2] == plain.alone


def test_answers_differ_from_each_other(plain: PlainAnswers) -> None:
    # Else the other tests would compare nothing.
    assert len({answer.token_ids for answer in plain.together}) == len(plain.asks)


def test_layout_chunks_and_batches_change_no_bit(plain: PlainAnswers) -> None:
    with served_mesh(plain.checkpoint, {"DTYPE": plain.dtype, **ALL_OTHER.settings}) as mesh:
        assert_same_bits(mesh.client, plain)


@pytest.mark.parametrize("layout", [ALL_OTHER, pytest.param(PLAIN, marks=pytest.mark.slow)], ids=str)
def test_drafts_right_and_wrong_change_no_bit(plain: PlainAnswers, layout: Layout, tmp_path: Path) -> None:
    modules = modules_for([(answer.prompt_token_ids, answer.token_ids) for answer in plain.together], tmp_path)
    # Where several steps are in flight, none has drafts.
    settings = {"DTYPE": plain.dtype, **layout.settings, "MICRO_BATCHES": "1", "PREFIX_CACHE": "off"}
    with served_mesh(plain.checkpoint, settings, modules=modules) as mesh:
        assert_same_bits(mesh.client, plain)
        num_tokens = len(plain.asks[::8] + plain.asks) * MAX_TOKENS
        wait_until(lambda: metric(mesh, "moemesh_tokens_generated_total") >= num_tokens, 10, "the metrics to say so")
        num_prefilled = sum(len(answer.prompt_token_ids) for answer in plain.together[::8] + plain.together)
        num_computed = metric(mesh, "moemesh_tokens_planned_total") - num_prefilled
        # Without wrong drafts each token but the last one of an answer is computed once.
        assert num_computed > num_tokens
        for outcome in ("accepted", "rejected"):
            assert metric(mesh, f"moemesh_drafts_{outcome}_total") > len(plain.asks), outcome


@pytest.mark.slow
@pytest.mark.parametrize("layout", ONE_BY_ONE, ids=str)
def test_no_single_setting_changes_a_bit(plain: PlainAnswers, layout: Layout) -> None:
    with served_mesh(plain.checkpoint, {"DTYPE": plain.dtype, **layout.settings}) as mesh:
        assert_same_bits(mesh.client, plain)
