"""One whole forward pass, layers, gates and experts, against transformers' own model on the same files."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.messages import Header
from services.stage.model.executor import Executor, Finished, WantsExperts
from services.stage.model.micro_batch import read_micro_batch
from tests.support.checkpoints.tiny_checkpoints import (
    MIXTRAL_SHARDED,
    MIXTRAL_SLIDING_TIED,
    QWEN3,
    QWEN3_DENSE_LAYERS,
    QWEN3_TIED_SHARDED_BF16,
    QWEN3_YARN,
    Family,
    Recipe,
    write_checkpoint,
)
from tests.support.nodes.kernels import KERNEL_CHOICES, kernels_for, one_torch_thread
from tests.support.nodes.local_pipeline import Chunk, LocalPipeline

__all__ = ["one_torch_thread"]
RECIPES = (QWEN3, QWEN3_TIED_SHARDED_BF16, MIXTRAL_SHARDED, MIXTRAL_SLIDING_TIED, QWEN3_DENSE_LAYERS, QWEN3_YARN)
CORNERS = (
    Recipe("one expert", Family.QWEN3_MOE, layers=2, experts=1, experts_per_token=1, seed=11),
    Recipe("every expert for every token", Family.MIXTRAL, layers=2, experts=5, experts_per_token=5, seed=12),
    Recipe("heads wider than the model", Family.QWEN3_MOE, layers=2, heads=2, kv_heads=2, head_width=80, seed=13),
    Recipe("narrow heads, one for all", Family.MIXTRAL, layers=2, heads=6, kv_heads=1, head_width=6, seed=14),
    Recipe("odd widths", Family.QWEN3_MOE, layers=2, width=52, heads=4, kv_heads=4, expert_width=37, seed=15),
    Recipe(
        "window by flag",
        Family.QWEN3_MOE,
        layers=3,
        seed=16,
        options={"use_sliding_window": True, "sliding_window": 20, "rms_norm_eps": 1e-3},
    ),
    Recipe("window of one", Family.MIXTRAL, layers=2, seed=17, options={"sliding_window": 1}),
    Recipe(
        "llama3 rope",
        Family.MIXTRAL,
        layers=2,
        seed=18,
        rope={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    Recipe(
        "old linear rope",
        Family.QWEN3_MOE,
        layers=2,
        seed=19,
        legacy_rope_fields=True,
        rope={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    ),
)
"""Small ones, each with one thing that is unlike the usual."""
TOKENS = tuple((7 * position * position + 3 * position + 11) % 200 for position in range(70))
Made = Callable[[Recipe], tuple[Path, Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A recipe's checkpoint, and transformers' logits [70, V] in float32 for TOKENS."""
    kept: dict[str, tuple[Path, Tensor]] = {}

    def make(recipe: Recipe) -> tuple[Path, Tensor]:
        if recipe.name not in kept:
            directory = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / recipe.name, recipe)
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, experts_implementation="eager"
            )
            with torch.inference_mode():
                kept[recipe.name] = directory, model(torch.tensor([TOKENS])).logits[0]
        return kept[recipe.name]

    return make


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kernels", KERNEL_CHOICES)
@pytest.mark.parametrize("recipe", RECIPES + CORNERS, ids=lambda recipe: recipe.name)
def test_logits_are_those_of_transformers(recipe: Recipe, kernels: str, made: Made) -> None:
    directory, wanted = made(recipe)
    pipeline = LocalPipeline(directory, kernels=kernels_for(kernels))
    assert difference(pipeline.logits([Chunk(1, TOKENS)]), wanted) < 1e-4


@pytest.mark.parametrize("recipe", [QWEN3, MIXTRAL_SLIDING_TIED, QWEN3_DENSE_LAYERS], ids=lambda recipe: recipe.name)
def test_stages_chunks_nodes_and_batch_mates_change_no_bit(recipe: Recipe, made: Made) -> None:
    directory, wanted = made(recipe)
    kernels = kernels_for("native")
    whole = LocalPipeline(directory, kernels=kernels).logits([Chunk(1, TOKENS)])
    assert difference(whole, wanted) < 1e-4
    pipeline = LocalPipeline(directory, pp=3, num_nodes=3, kernels=kernels)
    others = TOKENS[::-1]
    rows = [
        pipeline.logits([Chunk(8, others[:5]), Chunk(1, TOKENS[:33])])[5:],
        pipeline.logits([Chunk(1, TOKENS[33:34]), Chunk(9, others)])[:1],
        pipeline.logits([Chunk(8, others[5:6]), Chunk(1, TOKENS[34:69]), Chunk(9, others[:1])])[1:-1],
        pipeline.logits([Chunk(1, TOKENS[69:])]),
    ]
    assert torch.equal(torch.cat(rows), whole)


@pytest.mark.parametrize("recipe", [QWEN3, MIXTRAL_SLIDING_TIED, QWEN3_DENSE_LAYERS], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_one_prompt_that_are_under_way_together_have_its_bits(recipe: Recipe, seed: int, made: Made) -> None:
    """On each stage, experts answer in any order."""
    directory, _ = made(recipe)
    kernels, chance = kernels_for("native"), random.Random(seed)
    whole = LocalPipeline(directory, kernels=kernels).logits([Chunk(1, TOKENS)])
    pipeline = LocalPipeline(directory, pp=2, kernels=kernels)
    steps = [pipeline.step([Chunk(1, TOKENS[start : start + 15])]) for start in range(0, len(TOKENS), 15)]
    arrived = [(step, torch.tensor(TOKENS[15 * n : 15 * n + 15])) for n, step in enumerate(steps)]
    for model, caches, tables in zip(pipeline.models, pipeline.caches, pipeline.tables, strict=True):
        memory: Any = SimpleNamespace(caches=caches)
        executor, waiting, left = Executor(model, memory), [], []
        for step, hidden in arrived:
            executor.add(step, Header(), 9.0, read_micro_batch(step, hidden, tables))
        while executor.num_running:
            while executor.has_work:
                outcome = executor.run_one()
                assert isinstance(outcome, WantsExperts | Finished)
                if isinstance(outcome, WantsExperts):
                    waiting.append(outcome)
                else:
                    left.append((outcome.running.step, outcome.output))
            if waiting:
                wanted = waiting.pop(chance.randrange(len(waiting)))
                executor.resume(wanted.running, pipeline.answer(wanted.call))
        assert [step for step, _ in left] == steps, "they leave in their order"
        arrived = left
    assert torch.equal(torch.cat([logits for _, logits in arrived]), whole[[14, 29, 44, 59, 69]])


@pytest.mark.parametrize("kernels", KERNEL_CHOICES)
@pytest.mark.parametrize("recipe", [QWEN3, MIXTRAL_SLIDING_TIED, QWEN3_DENSE_LAYERS], ids=lambda recipe: recipe.name)
def test_a_row_has_its_bits_with_drafts_behind_it_and_wrong_ones_leave_nothing(
    recipe: Recipe, kernels: str, made: Made
) -> None:
    """Across the end of a block. The row behind wrong drafts stands where the first of them stood."""
    directory, _ = made(recipe)
    whole = LocalPipeline(directory, kernels=kernels_for(kernels)).logits([Chunk(1, TOKENS)])
    pipeline = LocalPipeline(directory, pp=2, kernels=kernels_for(kernels))
    place = 57
    pipeline.logits([Chunk(1, TOKENS[:place])])
    for num_right in (0, 2, 1, 0, 3):
        right, others = TOKENS[place : place + 1 + num_right], TOKENS[place + 1 + num_right : place + 4]
        drafted = (*right, *((token + 1) % pipeline.config.vocab_size for token in others))
        logits = pipeline.logits([Chunk(9, (5,)), Chunk(1, drafted), Chunk(8, TOKENS[:3])])[1 : 1 + len(right)]
        assert torch.equal(logits, whole[place : place + len(right)])
        place += len(right)
        pipeline.lengths[1] = place
    assert place == 68


@pytest.mark.parametrize("kernels", KERNEL_CHOICES)
def test_the_rows_that_sample_have_the_logits_that_they_have_among_all(kernels: str, made: Made) -> None:
    directory, _ = made(QWEN3)
    pipeline = LocalPipeline(directory, kernels=kernels_for(kernels))
    (model,), (caches,) = pipeline.models, pipeline.caches
    step = pipeline.step([Chunk(1, TOKENS[:9]), Chunk(2, TOKENS[9:20])])
    batch = read_micro_batch(step, torch.tensor(TOKENS[:20]), pipeline.tables[0])
    assert batch.sampling_rows.tolist() == [8, 19]
    sampled = pipeline.run(model, batch, caches)
    assert torch.equal(sampled, pipeline.run(model, replace(batch, sampling_rows=torch.arange(20)), caches)[[8, 19]])


@pytest.mark.parametrize("combine", ["exact", "partial"])
def test_sliced_experts_add_up_to_whole_ones(combine: str, made: Made) -> None:
    directory, wanted = made(QWEN3)
    pipeline = LocalPipeline(directory, num_slices=3, num_nodes=2, combine=combine, kernels=kernels_for("native"))
    assert difference(pipeline.logits([Chunk(1, TOKENS)]), wanted) < 1e-4


@pytest.mark.parametrize("kernels", KERNEL_CHOICES)
def test_a_step_that_only_releases_passes_through_every_stage(kernels: str, made: Made) -> None:
    """Releases go in a step of their own when many wait and nothing runs; the stages must answer it."""
    directory, _ = made(QWEN3)
    pipeline = LocalPipeline(directory, pp=2, kernels=kernels_for(kernels))
    pipeline.logits([Chunk(1, TOKENS[:5]), Chunk(2, TOKENS[:3])])
    assert [len(tables) for tables in pipeline.tables] == [2, 2]
    logits = pipeline.output([], released=[1, 2])
    assert logits.shape == (0, pipeline.config.vocab_size)
    assert [len(tables) for tables in pipeline.tables] == [0, 0]


def test_bfloat16_is_as_near_to_transformers_as_bfloat16_can_be(made: Made) -> None:
    directory, wanted = made(QWEN3_TIED_SHARDED_BF16)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs = model(torch.tensor([TOKENS])).logits[0].float()
    pipeline = LocalPipeline(directory, dtype=torch.bfloat16, kernels=kernels_for("native"))
    ours = pipeline.logits([Chunk(1, TOKENS)]).float()
    assert (ours - wanted).abs().mean() < 1.5 * (theirs - wanted).abs().mean()
