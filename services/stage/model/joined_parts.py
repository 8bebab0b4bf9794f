"""Several parts of a layer in one process, computed one after another as if each had a process of its own.

On a device the bits of a product may depend on its shape. A stage whose ranks are fewer than it was set to have keeps
the shapes, and so the bits, of the full degree: its ranks have several parts each.

T tokens, D model width, H query heads, N head width, F width of a dense feed-forward network; of these parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.stage.model.attention import Attention
from services.stage.model.dense_part import DensePart
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import LayerKvCache


@dataclass(frozen=True, slots=True)
class JoinedColumns:
    """Output columns of a linear layer, each part's behind the one before."""

    parts: tuple[Callable[[Tensor], Tensor], ...]
    num_columns: int | None = None
    """What they have beyond that is filler."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, width] -> [T, columns of all parts]."""
        return torch.cat([part(x) for part in self.parts], dim=1)[:, : self.num_columns]


@dataclass(frozen=True, slots=True)
class JoinedAttention:
    """Heads of several parts."""

    parts: tuple[Attention, ...]
    kv_heads: tuple[slice, ...]
    """Of each part, within the cache of all of them; two parts may have the same."""
    output: JoinedColumns

    def __call__(self, x: Tensor, batch: MicroBatch, rotary: tuple[Tensor, Tensor], cache: LayerKvCache) -> Tensor:
        """x [T, D] -> [T, D], where these are all parts."""
        return self.output(self.heads(x, batch, rotary, cache))

    def heads(self, x: Tensor, batch: MicroBatch, rotary: tuple[Tensor, Tensor], cache: LayerKvCache) -> Tensor:
        """x [T, D] -> [T, H * N]."""
        caches = [cache.of_heads(own.start, own.stop) for own in self.kv_heads]
        return torch.cat([part.heads(x, batch, rotary, own) for part, own in zip(self.parts, caches, strict=True)], 1)


@dataclass(frozen=True, slots=True)
class JoinedDense:
    """Columns of several parts of a dense feed-forward network."""

    parts: tuple[DensePart, ...]
    down: JoinedColumns

    def middle(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, F]."""
        return torch.cat([part.middle(x) for part in self.parts], dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D], where these are all parts."""
        return self.down(self.middle(x))


AttentionPart = Attention | JoinedAttention
"""What one process has of a layer's attention."""
DenseColumns = DensePart | JoinedDense
"""What one process of several has of a dense feed-forward network; a single one with one part has a GatedExpert."""


def join_attention(parts: list[Attention], kv_heads: list[slice]) -> AttentionPart:
    """One part as it is. `kv_heads` of each, among those of the whole model."""
    if len(parts) == 1:
        return parts[0]
    first = kv_heads[0].start
    own = tuple(slice(heads.start - first, heads.stop - first) for heads in kv_heads)
    return JoinedAttention(tuple(parts), own, JoinedColumns(tuple(part.output for part in parts)))


def join_dense(parts: list[DensePart]) -> DenseColumns:
    """One part as it is."""
    return parts[0] if len(parts) == 1 else JoinedDense(tuple(parts), JoinedColumns(tuple(p.down for p in parts)))


def join_columns(parts: list[Callable[[Tensor], Tensor]], num_columns: int | None) -> Callable[[Tensor], Tensor]:
    """One part as it is."""
    return parts[0] if len(parts) == 1 else JoinedColumns(tuple(parts), num_columns)
