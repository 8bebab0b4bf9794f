"""Token ids to hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Embedding:
    """A row of the table for each token; of a rank's table, some columns of it."""

    table: Tensor
    """[V, D]."""

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, D]."""
        return self.table[token_ids]
