"""A stage's layers on a device: the same as on the host, by copies at the seams and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.compute.device import StagedDevice
from tests.support.checkpoints.tiny_checkpoints import (
    MIXTRAL_SLIDING_TIED,
    QWEN3,
    QWEN3_DENSE_LAYERS,
    QWEN3_TIED_SHARDED_BF16,
    Recipe,
    write_checkpoint,
)
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.local_pipeline import Chunk, LocalPipeline
from tests.support.nodes.simulated_gpu import hidden_waits, simulated_gpu

__all__ = ["one_torch_thread"]
TOKENS = tuple((7 * position * position + 3 * position + 11) % 200 for position in range(70))


@pytest.fixture(scope="module", params=[QWEN3, MIXTRAL_SLIDING_TIED, QWEN3_DENSE_LAYERS], ids=lambda r: r.name)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe: Recipe = request.param
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), recipe)


def test_copies_there_and_back_change_no_bit(directory: Path) -> None:
    """Plain memory as the device: the same arithmetic as the host's without native kernels."""
    staged = LocalPipeline(directory, pp=2, num_nodes=2, device=StagedDevice(torch.device("cpu")))
    logits = staged.logits([Chunk(1, TOKENS), Chunk(2, TOKENS[:3])])
    assert torch.equal(logits, LocalPipeline(directory).logits([Chunk(1, TOKENS), Chunk(2, TOKENS[:3])]))


def test_chunks_stages_nodes_and_batch_mates_change_no_bit_on_a_gpu_and_nothing_waits_unseen(directory: Path) -> None:
    expected = LocalPipeline(directory).logits([Chunk(1, TOKENS)])
    with simulated_gpu() as device:
        whole = LocalPipeline(directory, device=device).logits([Chunk(1, TOKENS)])
        pipeline = LocalPipeline(directory, pp=2, num_nodes=2, device=device)
        hidden_waits().clear()
        others = TOKENS[::-1]
        rows = [
            pipeline.logits([Chunk(8, others[:5]), Chunk(1, TOKENS[:33])])[5:],
            pipeline.logits([Chunk(1, TOKENS[33:34]), Chunk(9, others)])[:1],
            pipeline.logits([Chunk(8, others[5:6]), Chunk(1, TOKENS[34:69]), Chunk(9, others[:1])])[1:-1],
            pipeline.logits([Chunk(1, TOKENS[69:])]),
        ]
        assert hidden_waits() == []
    assert torch.equal(torch.cat(rows), whole)
    assert (whole - expected).abs().max() < 1e-4


def test_bfloat16_on_a_gpu_is_as_near_as_on_the_host(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "bf16", QWEN3_TIED_SHARDED_BF16)
    exact = LocalPipeline(directory).logits([Chunk(1, TOKENS)])
    on_host = LocalPipeline(directory, dtype=torch.bfloat16).logits([Chunk(1, TOKENS)]).float()
    with simulated_gpu() as device:
        on_gpu = LocalPipeline(directory, dtype=torch.bfloat16, device=device).logits([Chunk(1, TOKENS)]).float()
    assert (on_gpu - exact).abs().mean() < 1.5 * (on_host - exact).abs().mean()


def test_a_step_that_only_releases_passes_through(directory: Path) -> None:
    with simulated_gpu() as device:
        pipeline = LocalPipeline(directory, pp=2, device=device)
        pipeline.logits([Chunk(1, TOKENS[:5])])
        assert pipeline.output([], released=[1]).shape == (0, pipeline.config.vocab_size)
