"""What ranks get from torch.distributed, and where."""

from __future__ import annotations

from pathlib import Path

from tests.support.collective_ranks import assert_collectives, results_of_ranks


def test_each_rank_gets_by_gloo_what_the_collective_promises(tmp_path: Path) -> None:
    assert_collectives(results_of_ranks(["cpu", "cpu"], tmp_path))
