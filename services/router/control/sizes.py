"""How many bytes a role takes, from the model's shapes, and what that leaves for the KV cache. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from common.checkpoint.model_config import ModelConfig
from common.errors import CapacityError, ConfigurationError
from common.topology import LayerRange


@dataclass(frozen=True, slots=True)
class MeshShape:
    """What the operator has set, as far as roles depend on it."""

    pp: int
    spares: int
    copies: int
    num_slices: int
    item_bytes: int
    """Bytes of one weight or one number of the cache."""
    block_tokens: int
    kv_cache_tokens: int
    """Tokens wished for per pipeline; memory may allow less."""
    session_cache_bytes: int = 0
    """Host memory of each stage for cached blocks that had to make room; memory may allow less."""


def plan_layers(config: ModelConfig, pp: int) -> list[LayerRange]:
    """Finds the layer ranges of a pipeline's `pp` slots, balanced by the weights that one token reads.

    A MoE layer counts its active experts as well: while they run, the stage's micro-batch waits. The embedding reads
    one row per token, the lm_head all of its weights. Raises ConfigurationError for more stages than layers.
    """
    if pp > config.num_layers:
        raise ConfigurationError(
            f"PP={pp}: {config.num_layers} layers cannot be cut into {pp} stages of at least one layer each"
        )
    active_experts = config.num_experts_per_token * config.expert_parameters()
    costs = [
        config.layer_parameters_on_stage(layer) + (active_experts if config.moe_layers[layer] else 0)
        for layer in range(config.num_layers)
    ]
    return balance_layers(costs, config.hidden_size, config.embedding_parameters(), pp)


def shard_bytes(config: ModelConfig, shape: MeshShape) -> int:
    """Counts the bytes of an expert's widest slice in one layer. Raises ConfigurationError for no width at all."""
    if shape.num_slices > config.expert_intermediate_size:
        raise ConfigurationError(
            f"EXPERT_SLICES={shape.num_slices}: the experts of this model are {config.expert_intermediate_size} wide"
        )
    widest = -(-config.expert_intermediate_size // shape.num_slices)
    return 3 * config.hidden_size * widest * shape.item_bytes


class StageSizes:
    """What the holders of a pipeline's slots need in bytes. Slots are named by their index."""

    def __init__(self, config: ModelConfig, shape: MeshShape, layers: Sequence[LayerRange]) -> None:
        """`layers` of each slot."""
        self._config = config
        self._shape = shape
        self._layers = layers

    def weight_bytes(self, slot: int) -> int:
        """Counts the bytes of weights."""
        parameters = sum(self._config.layer_parameters_on_stage(layer) for layer in range(*self._layers[slot]))
        parameters += self._config.embedding_parameters() * ((slot == 0) + self._is_last(slot))
        return parameters * self._shape.item_bytes

    def block_bytes(self, slot: int) -> int:
        """Counts the bytes of a block: K and V, and the activation log on all but the last slot."""
        layers = self._layers[slot]
        values = (layers.stop - layers.start) * self._config.kv_values_per_token()
        values += 0 if self._is_last(slot) else self._config.hidden_size
        return values * self._shape.block_tokens * self._shape.item_bytes

    def pool_blocks(self, capacities: Mapping[int, int]) -> int:
        """Counts the KV blocks of a pipeline whose slots offer these capacities in bytes; slots that are not named are
        no limit. Raises CapacityError with the numbers."""
        blocks = -(-self._shape.kv_cache_tokens // self._shape.block_tokens)
        for slot, capacity in capacities.items():
            weights, block_bytes = self.weight_bytes(slot), self.block_bytes(slot)
            # One block more than the router uses is there for self-tests.
            blocks = min(blocks, (capacity - weights) // block_bytes - 1)
            if blocks < 1:
                raise CapacityError(
                    f"stage slot {slot} needs {weights} bytes of weights and {block_bytes} per KV block; "
                    f"its node offers {capacity} bytes"
                )
        return blocks

    def tier_slots(self, capacities: Mapping[int, int], num_blocks: int) -> int:
        """Counts the blocks for which each slot's holder has room in its session tier, beside its weights and a pool of
        `num_blocks`. Capacities as in `pool_blocks`."""
        counts: list[int] = []
        for slot in range(len(self._layers)):
            block_bytes, left = self.block_bytes(slot), self._shape.session_cache_bytes
            if slot in capacities:
                left = min(left, capacities[slot] - self.weight_bytes(slot) - (num_blocks + 1) * block_bytes)
            counts.append(max(0, left) // block_bytes)
        return min(counts)

    def too_small(self, capacities: Mapping[int, int]) -> dict[int, str]:
        """Finds slots whose node, with a capacity in bytes by slot, has no room for them, and how much it lacks."""
        found: dict[int, str] = {}
        for slot, capacity in capacities.items():
            try:
                self.pool_blocks({slot: capacity})
            except CapacityError as error:
                found[slot] = str(error)
        return found

    def _is_last(self, slot: int) -> bool:
        return slot == len(self._layers) - 1


def balance_layers(
    layer_costs: Sequence[float], first_extra: float, last_extra: float, num_stages: int
) -> list[LayerRange]:
    """Finds contiguous ranges, one for each of at most as many stages as layers, that minimise the most expensive
    stage; each has at least one layer.

    `first_extra` (embedding) and `last_extra` (final norm, lm_head) are added to the first and the last stage; all
    costs are in one unit and not negative. Among the plans with the same maximum, the most even one (least sum of
    squares) is taken, then the one with the lower starts.
    """
    extras = [0.0] * num_stages
    extras[0] += first_extra
    extras[-1] += last_extra
    return [LayerRange(start, stop) for start, stop in pairwise((0, *_even_stops(layer_costs, extras)))]


def _even_stops(layer_costs: Sequence[float], extras: Sequence[float]) -> tuple[int, ...]:
    """Returns where each stage ends. `extras`: what each costs beside its layers."""
    num_layers, num_stages = len(layer_costs), len(extras)
    before = [0.0, *accumulate(layer_costs)]

    def options(stage: int, start: int) -> Iterator[tuple[int, float]]:
        """Yields where a stage may end, ascending, with what it costs then: each later one needs a layer, and the last
        takes all that is left."""
        num_later = num_stages - 1 - stage
        for stop in range(start + 1 if num_later else num_layers, num_layers - num_later + 1):
            yield stop, before[stop] - before[start] + extras[stage]

    # Best over the stages from this one on. Two passes, because the least maximum and the least sum of squares do not
    # compose in one.
    @cache
    def least_maximum(stage: int, start: int) -> float:
        if stage == num_stages:
            return 0.0
        return min(max(cost, least_maximum(stage + 1, stop)) for stop, cost in options(stage, start))

    @cache
    def most_even(stage: int, start: int) -> tuple[float, tuple[int, ...]]:
        """Returns the least sum of squares, and its stops; of two equal ones those with the lower start."""
        if stage == num_stages:
            return 0.0, ()
        fitting = [(stop, cost, most_even(stage + 1, stop)) for stop, cost in options(stage, start) if cost <= limit]
        plans = [(cost * cost + squares, (stop, *stops)) for stop, cost, (squares, stops) in fitting]
        return min(plans, key=lambda plan: plan[0], default=(math.inf, ()))

    limit = least_maximum(0, 0)
    return most_even(0, 0)[1]
