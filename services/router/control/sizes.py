"""How many bytes a role takes, from the model's shapes, and what that leaves for the KV cache. Pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.checkpoint.model_config import ModelConfig
from common.errors import CapacityError, ConfigurationError
from common.topology import LayerRange
from services.router.control.planner import balance_layers


@dataclass(frozen=True, slots=True)
class MeshShape:
    """What the operator has set, as far as roles depend on it."""

    pp: int
    spares: int
    copies: int
    num_slices: int
    item_bytes: int
    """Of one weight or one number of the cache."""
    block_tokens: int
    kv_cache_tokens: int
    """Wished for a pipeline; memory may allow less."""


def plan_layers(config: ModelConfig, pp: int) -> list[LayerRange]:
    """Layer ranges of a pipeline's `pp` slots, balanced by the weights that one token reads.

    A MoE layer counts its active experts as well: while they run, the stage's micro-batch waits. The embedding reads
    one row a token, the lm_head all of its weights. Raises ConfigurationError for more stages than layers.
    """
    active_experts = config.num_experts_per_token * config.expert_parameters()
    costs = [
        config.layer_parameters_on_stage(layer) + (active_experts if config.moe_layers[layer] else 0)
        for layer in range(config.num_layers)
    ]
    try:
        return balance_layers(costs, config.hidden_size, config.embedding_parameters(), pp)
    except ConfigurationError as error:
        raise ConfigurationError(f"PP={pp}: {error}") from None


def stage_weight_bytes(config: ModelConfig, shape: MeshShape, slot: int, layers: LayerRange) -> int:
    """Weights that the holder of a slot keeps in memory."""
    parameters = sum(config.layer_parameters_on_stage(layer) for layer in range(layers.start, layers.stop))
    parameters += config.embedding_parameters() * ((slot == 0) + (slot == shape.pp - 1))
    return parameters * shape.item_bytes


def shard_bytes(config: ModelConfig, shape: MeshShape) -> int:
    """Weights of the widest slice of one expert of one layer. Raises ConfigurationError for slices of no width."""
    if shape.num_slices > config.expert_intermediate_size:
        raise ConfigurationError(
            f"EXPERT_SLICES={shape.num_slices}: the experts of this model are {config.expert_intermediate_size} wide"
        )
    widest = -(-config.expert_intermediate_size // shape.num_slices)
    return 3 * config.hidden_size * widest * shape.item_bytes


def block_bytes_of(config: ModelConfig, shape: MeshShape, slot: int, layers: LayerRange) -> int:
    """Paged memory of one block on the holder of a slot: K and V, and the activation log on all but the last."""
    values = (layers.stop - layers.start) * config.kv_values_per_token()
    values += config.hidden_size if slot < shape.pp - 1 else 0
    return values * shape.block_tokens * shape.item_bytes


def pool_blocks(config: ModelConfig, shape: MeshShape, layers: Sequence[LayerRange], capacities: Sequence[int]) -> int:
    """KV blocks of a pipeline whose slots offer these capacities. Raises CapacityError with the numbers."""
    wished = -(-shape.kv_cache_tokens // shape.block_tokens)
    blocks = wished
    for slot, (span, capacity) in enumerate(zip(layers, capacities, strict=True)):
        weights = stage_weight_bytes(config, shape, slot, span)
        block_bytes = block_bytes_of(config, shape, slot, span)
        # One block more than the router uses is there for self-tests.
        blocks = min(blocks, (capacity - weights) // block_bytes - 1)
        if blocks < 1:
            raise CapacityError(
                f"stage slot {slot} needs {weights} bytes of weights and {block_bytes} a KV block; "
                f"its node offers {capacity} bytes"
            )
    return blocks


def too_small(
    config: ModelConfig, shape: MeshShape, layers: Sequence[LayerRange], capacities: Mapping[int, int]
) -> dict[int, str]:
    """Slots whose node, with a capacity in bytes by slot, has no room for them, and how much it lacks."""
    found: dict[int, str] = {}
    for slot, capacity_bytes in capacities.items():
        others = [sys.maxsize] * len(layers)
        others[slot] = capacity_bytes
        try:
            pool_blocks(config, shape, layers, others)
        except CapacityError as error:
            found[slot] = str(error)
    return found
