"""Which part of a stage's weights a rank holds (TP: tensor parallelism). Pure.

A rank is to a stage what a thread is to a kernel: it takes some heads and some output columns, and never a part of a
sum. So the bits of a result do not depend on the degree (`ordered`, docs/numerics.md). In `fast` the second linear of
each half is cut along its input, as in Megatron-LM (Shoeybi et al., arXiv 1909.08053), and ranks add partial sums.

A device's library chooses its algorithm by the shape of a product. There the layers are always cut into as many *parts*
as the stage has ranks at its full degree, and a rank of a smaller group computes several of them, one after another.

D model width, H query heads, Hkv key/value heads, F width of a dense feed-forward layer, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.checkpoint.model_config import ModelConfig
from common.errors import ConfigurationError

MAX_DEGREE = 16
Reduce = Literal["ordered", "fast"]


@dataclass(frozen=True, slots=True)
class TpShard:
    """What rank `rank` of `degree` has."""

    rank: int = 0
    degree: int = 1
    reduce: Reduce = "ordered"
    num_parts: int = 0
    """Into which the layers are cut, a multiple of the degree; 0: as many as there are ranks."""

    @property
    def parts(self) -> tuple[TpShard, ...]:
        """Returns its parts in order, each as the shard of a rank that has no other."""
        degree = self.num_parts or self.degree
        each = degree // self.degree
        return tuple(TpShard(part, degree, self.reduce) for part in range(self.rank * each, (self.rank + 1) * each))

    @property
    def is_whole(self) -> bool:
        """Returns whether there is no other part."""
        return self.degree == 1 and self.num_parts <= 1

    @property
    def adds_partial_sums(self) -> bool:
        """Returns whether the second linear of each half is cut along its input."""
        return self.reduce == "fast" and not self.is_whole

    def even(self, size: int) -> slice:
        """Returns this rank's part of an axis that the degree divides."""
        part = size // self.degree
        return slice(self.rank * part, (self.rank + 1) * part)

    def kv_heads(self, num_kv_heads: int) -> slice:
        """Returns the KV heads of this rank's query heads. Where there are fewer of them than ranks, several ranks have
        one."""
        first, last = self.parts[0], self.parts[-1]
        each = max(1, num_kv_heads // first.degree)
        return slice(first.rank * num_kv_heads // first.degree, last.rank * num_kv_heads // last.degree + each)

    def padded(self, size: int) -> slice:
        """Returns this rank's part of an axis of any length, in parts of one size; the last ones may reach beyond its
        end."""
        part = -(-size // self.degree)
        return slice(self.rank * part, (self.rank + 1) * part)


WHOLE = TpShard()


def check_degree(config: ModelConfig, degree: int) -> None:
    """Raises ConfigurationError, with the numbers, for a degree that does not divide what has to be cut."""
    if degree > MAX_DEGREE:
        raise ConfigurationError(f"TP={degree}: a stage has at most {MAX_DEGREE} ranks")
    widths = {"query heads": config.num_heads, "hidden width": config.hidden_size}
    if not all(config.moe_layers):
        widths["width of its dense layers"] = config.dense_intermediate_size
    for name, size in widths.items():
        if size % degree:
            raise ConfigurationError(f"TP={degree} does not divide this model's {name}, {size}")
    if config.num_kv_heads % degree and degree % config.num_kv_heads:
        raise ConfigurationError(
            f"TP={degree} neither divides this model's {config.num_kv_heads} key/value heads nor is a multiple of them"
        )


def best_degree(config: ModelConfig, num_ranks: int, num_parts: int = 0) -> int:
    """Returns the highest degree that the model allows with `num_ranks`; with `num_parts`, one that divides them."""
    for degree in range(min(num_ranks, MAX_DEGREE), 1, -1):
        if num_parts % degree:
            continue
        try:
            check_degree(config, degree)
        except ConfigurationError:
            continue
        return degree
    return 1
