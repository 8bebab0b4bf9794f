"""Ranks that do nothing but collectives, each a process.

python -m tests.support.nodes.collective_ranks RANK DEGREE PORT PLACE FILE
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.stage.ranks.torch_collectives import TorchCollectives, open_store

ROWS, COLUMNS = 5, 3


def part_of(rank: int) -> Tensor:
    """What a rank brings: whole numbers, so that sums are the same in any order."""
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) + 100 * rank


def results_of_ranks(places: Sequence[str], folder: Path) -> list[dict[str, Tensor]]:
    """What each rank, one a place, gets from each collective. Raises RuntimeError with what a rank has said."""
    store = open_store()
    files = [folder / f"rank-{rank}.pt" for rank in range(len(places))]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), str(len(places)), str(store.port), place, str(files[rank])],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, place in enumerate(places)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("\n".join(said))
    return [torch.load(file) for file in files]


def main(rank: int, degree: int, port: int, place: torch.device, file: Path) -> None:
    """One rank: each collective twice, since the first one connects."""
    if place.type == "cuda":
        torch.cuda.set_device(place)
    collectives = TorchCollectives(open_store(port), rank, degree, place)
    mine = part_of(rank).to(place)
    for _ in range(2):
        results = {
            "all_gather": collectives.all_gather(mine),
            "sum": collectives.sum(mine.clone()),
        }
    collectives.close()
    torch.save({name: result.cpu() for name, result in results.items()}, file)


def assert_collectives(results: list[dict[str, Tensor]]) -> None:
    """Each rank has got what the collective promises."""
    degree = len(results)
    parts = [part_of(rank) for rank in range(degree)]
    for rank, found in enumerate(results):
        expected = {
            "all_gather": torch.cat(parts, dim=1),
            "sum": torch.stack(parts).sum(0),
        }
        for name, wanted in expected.items():
            assert torch.equal(found[name], wanted), (rank, name)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), torch.device(sys.argv[4]), Path(sys.argv[5]))
