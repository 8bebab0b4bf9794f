"""What a rank does of one half of a layer, the same code on every rank, and how the parts come together.

In `ordered` nothing is added over ranks: heads are gathered where the output columns need all of them, output columns
where rank 0 needs all of those. In `fast` each rank's heads add to all columns: one sum in place of two gathers.

T tokens, D model width, H query heads, N head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.stage.model.joined_parts import AttentionPart, DenseColumns
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import LayerKvCache
from services.stage.model.tp_shard import RankCut
from services.stage.ranks.collectives import Collectives


def attend(
    part: AttentionPart,
    cut: RankCut,
    collectives: Collectives,
    x: Tensor,
    batch: MicroBatch,
    rotary: tuple[Tensor, Tensor],
    cache: LayerKvCache,
) -> Tensor | None:
    """x [T, D] -> [T, D] on rank 0. `cache`: this rank's KV heads."""
    heads = part.heads(x, batch, rotary, cache)
    if cut.adds_partial_sums:
        return collectives.sum(part.output(heads))
    return collectives.gather(part.output(collectives.all_gather(heads)))


def feed(part: DenseColumns, cut: RankCut, collectives: Collectives, x: Tensor) -> Tensor | None:
    """x [T, D] -> [T, D] on rank 0."""
    if cut.adds_partial_sums:
        return collectives.sum(part(x))
    return collectives.gather(part.down(collectives.all_gather(part.middle(x))))


def pieces(num_rows: int, columns: int, slab_bytes: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """[start, stop) of the rows that fit a slab together. Bits do not depend on where rows are cut."""
    at_once = max(1, slab_bytes // (columns * dtype.itemsize))
    return [(start, min(start + at_once, num_rows)) for start in range(0, num_rows, at_once)]
