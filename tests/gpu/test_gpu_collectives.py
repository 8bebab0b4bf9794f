"""The same collectives by NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.nodes.collective_ranks import assert_collectives, results_of_ranks

pytestmark = pytest.mark.gpu


def test_one_rank_by_nccl(tmp_path: Path) -> None:
    assert_collectives(results_of_ranks(["cuda:0"], tmp_path))


def test_two_ranks_of_one_gpu_by_nccl_where_it_lets_them(tmp_path: Path) -> None:
    try:
        results = results_of_ranks(["cuda:0", "cuda:0"], tmp_path)
    except RuntimeError as refusal:
        if "uplicate GPU" not in str(refusal) and "invalid usage" not in str(refusal):
            raise
        pytest.skip("NCCL lets no two ranks share a GPU")
    assert_collectives(results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_on_two_gpus_by_nccl(tmp_path: Path) -> None:
    assert_collectives(results_of_ranks(["cuda:0", "cuda:1"], tmp_path))
