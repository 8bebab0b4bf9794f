"""A stage over ranks has the bits of one without, at every degree, for every kind of layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.ids import Generation, LeaseTerm, PipelineId, SlotIndex
from common.model_config import read_model_config
from common.topology import LayerRange, StageRole, StageSlot
from common.weights import CheckpointWeights
from services.stage.attention_kernel import allocate_kv_cache
from services.stage.loading import load_stage
from tests.support.checkpoints import (
    MIXTRAL_SLIDING_TIED,
    QWEN3,
    QWEN3_DENSE_LAYERS,
    QWEN3_TIED_SHARDED_BF16,
    Recipe,
    write_checkpoint,
)
from tests.support.kernels import kernels_for, one_torch_thread  # noqa: F401
from tests.support.rank_threads import NUM_POSITIONS, batch_of, rank_threads, run_pass

BLOCKS = [2, 0, 1]


def whole_role(num_layers: int) -> StageRole:
    slot = StageSlot(PipelineId(0), SlotIndex(0))
    return StageRole(slot, LayerRange(0, num_layers), LeaseTerm(1), Generation(1), 1)


def token_ids(count: int, vocab_size: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int64) * 7919 % vocab_size


Alone = tuple[list[torch.Tensor], list[torch.Tensor]]


def alone(checkpoint: Path, dtype: torch.dtype) -> Alone:
    """Logits of a prefill, a decode step, and K of each layer, of a stage without ranks."""
    config = read_model_config(checkpoint)
    model = load_stage(
        CheckpointWeights(checkpoint, dtype), config, whole_role(config.num_layers), NUM_POSITIONS, kernels_for("native")
    )
    caches = allocate_kv_cache(config.num_layers, 3, config.num_kv_heads, config.head_dim, dtype)
    ids = token_ids(50, config.vocab_size)
    results = [model.logits(run_pass(model, batch_of(part, start, BLOCKS), caches)) for part, start in
               ((ids[:49], 0), (ids[49:], 49))]
    return results, [cache.keys.clone() for cache in caches]


@pytest.mark.parametrize("recipe", [QWEN3, QWEN3_DENSE_LAYERS, QWEN3_TIED_SHARDED_BF16, MIXTRAL_SLIDING_TIED], ids=lambda r: r.name)
def test_degrees_1_2_and_4_give_the_same_bits(recipe: Recipe, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, recipe)
    dtype = recipe.dtype
    expected, keys = alone(checkpoint, dtype)
    for degree in (2, 4):
        with rank_threads(checkpoint, degree) as ranks:
            config = ranks.config
            model = ranks.model(whole_role(config.num_layers), dtype)
            assert ranks.group.degree == degree
            caches = ranks.group.allocate_caches(config.num_layers, 3, dtype)
            ids = token_ids(50, config.vocab_size)
            for (part, start), logits in zip(((ids[:49], 0), (ids[49:], 49)), expected, strict=True):
                with torch.inference_mode():
                    got = model.logits(run_pass(model, batch_of(part, start, BLOCKS), caches))
                assert torch.equal(got, logits)
            assert all(torch.equal(cache.keys, own) for cache, own in zip(caches, keys, strict=True))
