"""Linear layers that are cut over the ranks of a stage. They put the parts of all ranks together themselves.

In `ordered` nothing is added over ranks: inputs are gathered where output columns need all of them, output columns
since every rank has the whole residual stream. In `fast` what each rank has of the input adds to all columns: one sum
in place of two gathers. A linear layer that is not cut is a PackedLinear.

T tokens, D model width, V vocabulary, C columns of one part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.compute.gated_ffn import gated_product
from common.compute.linear import PackedLinear
from common.compute.native_library import NativeKernels
from services.stage.model.tp_shard import WHOLE, TpShard


class Collectives(Protocol):
    """How ranks put their parts together. Every rank calls the same ones with parts of one shape, in one order."""

    def all_gather(self, part: Tensor) -> Tensor:
        """Returns [T, ranks * C] of each rank's [T, C], in order of ranks. It is valid until the next collective."""

    def sum(self, part: Tensor) -> Tensor:
        """Returns the sum [T, C] of each rank's [T, C]."""


class NoCollectives:
    """The exchange of a rank without others."""

    def all_gather(self, part: Tensor) -> Tensor:
        return part

    def sum(self, part: Tensor) -> Tensor:
        return part


@dataclass(frozen=True, slots=True)
class Sharding:
    """Which part of the layers a rank has, and how it comes to what they give together."""

    shard: TpShard
    collectives: Collectives


ALONE = Sharding(WHOLE, NoCollectives())


@dataclass(frozen=True, slots=True)
class Embedding:
    """A row of the table for each token; of a part's table, some columns of it."""

    table: Tensor
    """[V, D]."""

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Returns [T, D] for token ids int64 [T]."""
        return self.table.index_select(0, token_ids)


@dataclass(frozen=True, slots=True)
class ShardedColumns:
    """The embedding or the lm_head: each part has some of the output columns."""

    parts: tuple[Callable[[Tensor], Tensor], ...]
    collectives: Collectives
    num_columns: int
    """Columns of the whole layer; what the parts have beyond that is filler."""

    def __call__(self, x: Tensor) -> Tensor:
        """Turns x [T, ...] into [T, columns]: a copy, since what is embedded is the residual stream."""
        whole = self.collectives.all_gather(side_by_side([part(x) for part in self.parts]))
        return whole[:, : self.num_columns].clone()


@dataclass(frozen=True, slots=True)
class OrderedOutput:
    """The second linear of a half of a layer, in `ordered`: each part has some of the output columns."""

    parts: tuple[PackedLinear, ...]
    collectives: Collectives

    def __call__(self, x: Tensor) -> Tensor:
        """Turns x [T, what this rank has of the input] into [T, D], which is valid until the next collective."""
        whole = self.collectives.all_gather(x)
        return self.collectives.all_gather(side_by_side([part(whole) for part in self.parts]))


@dataclass(frozen=True, slots=True)
class SummedOutput:
    """The second linear of a half of a layer, in `fast`."""

    part: PackedLinear
    collectives: Collectives

    def __call__(self, x: Tensor) -> Tensor:
        """Turns x [T, what this rank has of the input] into [T, D]."""
        return self.collectives.sum(self.part(x))


@dataclass(frozen=True, slots=True)
class GatedColumns:
    """What one part has of the middle of a dense feed-forward network."""

    gate: PackedLinear
    up: PackedLinear
    kernels: NativeKernels | None

    def __call__(self, x: Tensor) -> Tensor:
        """Turns x [T, D] into [T, C]."""
        return gated_product(self.gate(x), self.up(x), kernels=self.kernels)


@dataclass(frozen=True, slots=True)
class ShardedFeedForward:
    """A dense feed-forward network over ranks. In `ordered` it has the bits of the whole one (`GatedExpert`)."""

    parts: tuple[GatedColumns, ...]
    down: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Turns x [T, D] into [T, D], the same on every rank."""
        return self.down(side_by_side([part(x) for part in self.parts]))


def side_by_side(parts: list[Tensor]) -> Tensor:
    """Puts [T, C] of each part together as [T, all columns]."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
