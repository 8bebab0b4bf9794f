"""Greedy answers over HTTP are those of transformers' generate() in fp32, in every shape of the mesh."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.parity.verdict import MAX_LOGPROB_DIFFERENCE, ParityCount, assert_parity
from tests.support.checkpoints.byte_runs import BYTE_TOKEN, text_of_pieces
from tests.support.checkpoints.prompts import TEXTS, random_prompts
from tests.support.checkpoints.reference import Reference
from tests.support.checkpoints.shelf import Shelf
from tests.support.checkpoints.tiny_checkpoints import (
    MIXTRAL_BF16,
    MIXTRAL_SHARDED,
    MIXTRAL_SLIDING_TIED,
    QWEN3,
    QWEN3_DENSE_LAYERS,
    QWEN3_TIED_SHARDED_BF16,
    QWEN3_YARN,
    RECIPES,
    Recipe,
)
from tests.support.served.mesh_client import Ask, MeshClient
from tests.support.served.served_mesh import served_mesh

pytestmark = pytest.mark.parity
MAX_TOKENS = 16
AT_ONCE = 32


@dataclass(frozen=True)
class Shape:
    """A checkpoint on a mesh."""

    recipe: Recipe
    pp: int
    experts: int
    combine: str
    slices: int = 1
    """Cuts of each expert along its width."""
    fast_ranks: int = 1
    """Processes of each stage; above 1, their sums are added in any order (`TP_REDUCE=fast`, by Gloo)."""

    def __str__(self) -> str:
        cut = f"-slices{self.slices}" if self.slices > 1 else ""
        ranks = f"-fast{self.fast_ranks}" if self.fast_ranks > 1 else ""
        return f"{self.recipe.name}-pp{self.pp}-experts{self.experts}-{self.combine}{cut}{ranks}"

    @property
    def settings(self) -> dict[str, str]:
        """Of the mesh."""
        ranks = {"TP": str(self.fast_ranks), "TP_REDUCE": "fast", "TP_COLLECTIVES": "gloo"}
        return {
            "PP": str(self.pp),
            "EXPERTS": str(self.experts),
            "COMBINE": self.combine,
            "EXPERT_SLICES": str(self.slices),
            "DTYPE": "float32",
            **(ranks if self.fast_ranks > 1 else {}),
        }


QUICK = (
    Shape(QWEN3_TIED_SHARDED_BF16, pp=3, experts=3, combine="exact"),
    Shape(MIXTRAL_SHARDED, pp=1, experts=3, combine="partial"),
    Shape(QWEN3_DENSE_LAYERS, pp=3, experts=1, combine="partial"),
    Shape(MIXTRAL_SLIDING_TIED, pp=1, experts=1, combine="exact"),
)
"""Run by `make test`: each value of each dimension at least once, and what differs most between checkpoints."""

_WHOLE = (
    *(
        Shape(recipe, pp, experts, combine)
        for recipe, pp, experts, combine in itertools.product(RECIPES, (1, 3), (1, 3), ("exact", "partial"))
    ),
    Shape(QWEN3, pp=2, experts=3, combine="exact", slices=2),
    Shape(MIXTRAL_BF16, pp=2, experts=3, combine="partial", slices=3),
    *(
        Shape(recipe, pp, experts, "exact", fast_ranks=ranks)
        for recipe, pp, experts, ranks in itertools.product(
            (QWEN3_TIED_SHARDED_BF16, MIXTRAL_BF16), (1, 2), (1, 3), (2, 4)
        )
    ),
)


def _shapes() -> list[object]:
    rest = [pytest.param(shape, id=str(shape), marks=pytest.mark.slow) for shape in _WHOLE if shape not in QUICK]
    return [*(pytest.param(shape, id=str(shape)) for shape in QUICK), *rest]


@dataclass(frozen=True)
class Served:
    """Both sides of a comparison."""

    client: MeshClient
    reference: Reference
    prompts: list[tuple[int, ...]]


@pytest.fixture(scope="module", params=_shapes())
def served(request: pytest.FixtureRequest, shelf: Shelf) -> Iterator[Served]:
    shape: Shape = request.param
    reference = shelf.reference(shape.recipe)
    with served_mesh(shelf.checkpoint(shape.recipe), shape.settings) as mesh:
        yield Served(mesh.client, reference, random_prompts(reference.vocabulary, seed=shape.recipe.seed))


def test_one_prompt_at_a_time_gets_the_references_tokens(served: Served, parity_count: ParityCount) -> None:
    for prompt in served.prompts:
        answer = served.client.ask(Ask(prompt, MAX_TOKENS))
        assert_parity(answer, served.reference.answer(prompt, MAX_TOKENS), served.reference, parity_count)


def test_prompts_at_once_get_the_references_tokens(served: Served, parity_count: ParityCount) -> None:
    prompts = list(itertools.islice(itertools.cycle(served.prompts), AT_ONCE))
    answers = served.client.ask_all([Ask(prompt, MAX_TOKENS) for prompt in prompts], concurrency=AT_ONCE)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_parity(answer, served.reference.answer(prompt, MAX_TOKENS), served.reference, parity_count)


@pytest.mark.parametrize("text", TEXTS)
def test_text_goes_in_and_comes_out_as_in_the_reference(served: Served, parity_count: ParityCount, text: str) -> None:
    tokenizer = served.reference.tokenizer
    prompt = tuple(tokenizer(text)["input_ids"])
    answer = served.client.ask(Ask(text, MAX_TOKENS))
    assert_parity(answer, served.reference.answer(prompt, MAX_TOKENS), served.reference, parity_count)
    expected_text = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    pieces = tokenizer.convert_ids_to_tokens(answer.token_ids, skip_special_tokens=True)
    if "\ufffd" in expected_text and any(BYTE_TOKEN.fullmatch(piece) for piece in pieces):
        # Random weights say bytes that are no text. The library then gives up the whole run, characters in it too.
        expected_text = text_of_pieces(pieces)
    # A decoder of SentencePiece's kind drops the blank in front of what it takes for the start of a text.
    assert answer.text.removeprefix(" ") == expected_text.removeprefix(" ")


def test_alternatives_are_the_references_best_tokens(served: Served) -> None:
    prompt, num_alternatives = served.prompts[4], 5
    answer = served.client.ask(Ask(prompt, 4, num_top_logprobs=num_alternatives, ignore_eos=True))
    scores = served.reference.logprobs(prompt, answer.token_ids)
    for alternatives, expected in zip(answer.top_logprobs, scores.topk(num_alternatives).values.tolist(), strict=True):
        # Names of tokens may coincide (parts of a character all print as "�"): then fewer are left.
        found = sorted(alternatives.values(), reverse=True)
        assert found[0] == pytest.approx(expected[0], abs=MAX_LOGPROB_DIFFERENCE)
        assert all(any(abs(value - other) <= MAX_LOGPROB_DIFFERENCE for other in expected) for value in found)


def test_whole_matrix_has_what_the_issue_names() -> None:
    recipes = {shape.recipe.name for shape in _WHOLE}
    assert {QWEN3.name, MIXTRAL_BF16.name, QWEN3_YARN.name} <= recipes
    assert {shape.recipe.layers for shape in _WHOLE} == {5, 7}
    assert {shape.recipe.experts for shape in _WHOLE} == {6, 12}
    assert all(shape in _WHOLE for shape in QUICK)
