"""Whole meshes on a GPU: the reference's tokens, the numeric rule, a mirror, and no mixture with processors."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from common.errors import NodeLostError
from tests.integration.test_stage_faults import READY_AGAIN_WITHIN_S, holder_of
from tests.parity.verdict import ParityCount, assert_parity
from tests.support.checkpoints.prompts import random_prompts
from tests.support.checkpoints.reference import Reference
from tests.support.checkpoints.shelf import Shelf
from tests.support.checkpoints.tiny_checkpoints import (
    MIXTRAL_SHARDED,
    MIXTRAL_SLIDING_TIED,
    QWEN3_DENSE_LAYERS,
    QWEN3_TIED_SHARDED_BF16,
    Recipe,
)
from tests.support.processes.waiting import wait_until
from tests.support.served.fault_runs import metric
from tests.support.served.mesh_client import Answer, Ask
from tests.support.served.served_mesh import ServedMesh, served_mesh

pytestmark = pytest.mark.gpu
MAX_TOKENS = 16
AT_ONCE = 32
SHAPES = (
    (QWEN3_TIED_SHARDED_BF16, {"PP": "3", "EXPERTS": "3"}),
    (MIXTRAL_SHARDED, {"PP": "1", "EXPERTS": "3", "COMBINE": "partial"}),
    (QWEN3_DENSE_LAYERS, {"PP": "2", "EXPERTS": "1"}),
    (MIXTRAL_SLIDING_TIED, {"PP": "1", "EXPERTS": "1"}),
)


@dataclass(frozen=True)
class Served:
    """Both sides of a comparison."""

    mesh: ServedMesh
    reference: Reference
    prompts: list[tuple[int, ...]]
    count: ParityCount


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape[0].name)
def served(request: pytest.FixtureRequest, shelf: Shelf) -> Iterator[Served]:
    recipe: Recipe = request.param[0]
    reference, count = shelf.reference(recipe), ParityCount()
    settings = {"DEVICE": "cuda", "DTYPE": "float32", **request.param[1]}
    with served_mesh(shelf.checkpoint(recipe), settings) as mesh:
        yield Served(mesh, reference, random_prompts(reference.vocabulary, seed=recipe.seed), count)
    print(count)


def test_greedy_answers_are_the_references(served: Served) -> None:
    """The margin rule of tests/parity."""
    prompts = list(itertools.islice(itertools.cycle(served.prompts), AT_ONCE))
    alone = [served.mesh.client.ask(Ask(prompt, MAX_TOKENS)) for prompt in served.prompts]
    together = served.mesh.client.ask_all([Ask(prompt, MAX_TOKENS) for prompt in prompts], concurrency=AT_ONCE)
    for prompt, answer in zip([*served.prompts, *prompts], [*alone, *together], strict=True):
        assert_parity(answer, served.reference.answer(prompt, MAX_TOKENS), served.reference, served.count)


def bits(answer: Answer) -> tuple[object, ...]:
    return answer.token_ids, answer.logprobs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_meshes_of_any_shape_give_the_same_bits_also_after_a_mirror_took_over(shelf: Shelf, dtype: str) -> None:
    checkpoint = shelf.checkpoint(QWEN3_TIED_SHARDED_BF16)
    vocabulary = shelf.reference(QWEN3_TIED_SHARDED_BF16).vocabulary
    asks = [
        Ask(prompt, MAX_TOKENS, temperature=temperature, seed=11, num_top_logprobs=2, ignore_eos=True)
        for prompt in random_prompts(vocabulary, seed=3)
        for temperature in (0.0, 1.0)
    ]
    common = {"DEVICE": "cuda", "DTYPE": dtype}
    with served_mesh(checkpoint, {**common, "PP": "1", "EXPERTS": "1"}) as mesh:
        expected = [bits(mesh.client.ask(ask)) for ask in asks]
        assert [bits(answer) for answer in mesh.client.ask_all(asks)] == expected
    shape = {"PP": "2", "SPARES": "1", "EXPERTS": "2", "PREFILL_CHUNK_TOKENS": "48"}
    with served_mesh(checkpoint, {**common, **shape}) as mesh:
        assert [bits(answer) for answer in mesh.client.ask_all(asks)] == expected
        wait_until(lambda: metric(mesh, "moemesh_mirrors_complete") == 1, READY_AGAIN_WITHIN_S, "the mirror")
        os.kill(dict(mesh.local.processes())[holder_of(mesh, 0)], signal.SIGKILL)
        assert [bits(answer) for answer in mesh.client.ask_all(asks)] == expected


def test_stages_on_a_gpu_work_with_experts_on_processors(shelf: Shelf) -> None:
    places = {name: {"DEVICE": "cuda"} for name in ("stage-0", "stage-1")}
    with served_mesh(shelf.checkpoint(QWEN3_DENSE_LAYERS), {"DTYPE": "float32"}, places=places) as mesh:
        reference = shelf.reference(QWEN3_DENSE_LAYERS)
        for prompt in random_prompts(reference.vocabulary, seed=5):
            answer = mesh.client.ask(Ask(prompt, MAX_TOKENS))
            assert_parity(answer, reference.answer(prompt, MAX_TOKENS), reference, ParityCount())


def test_a_gpu_among_processors_of_its_kind_is_refused(shelf: Shelf) -> None:
    """Whichever of the two comes second."""
    with (
        pytest.raises(NodeLostError, match=r"DEVICE must name the same kind of device for all"),
        served_mesh(shelf.checkpoint(QWEN3_DENSE_LAYERS), {"EXPERTS": "2"}, places={"expert-1": {"DEVICE": "cuda"}}),
    ):
        pass
