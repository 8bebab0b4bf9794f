"""Which part of a checkpoint goes into which folder, by the same plans as the router's. Pure."""

from __future__ import annotations

from common.checkpoint.model_config import ModelConfig
from common.errors import ConfigurationError
from common.ids import NodeId
from common.topology import CheckpointPart, ShardId
from services.router.control.experts.placement import ExpertNodeCapacity, place_shards
from services.router.control.sizes import plan_layers


def plan_parts(config: ModelConfig, pp: int, num_expert_folders: int, copies: int) -> dict[str, CheckpointPart]:
    """Parts by the names of their folders: `router` without weights, `stage-N` and `expert-N`.

    Each expert lies in `copies` expert folders. Raises ConfigurationError that names the option.
    """
    parts = {"router": CheckpointPart()}
    parts |= {f"stage-{slot}": CheckpointPart(layers=layers) for slot, layers in enumerate(plan_layers(config, pp))}
    dealt = deal_experts(config.num_experts, num_expert_folders, copies)
    return parts | {f"expert-{number}": CheckpointPart(experts=experts) for number, experts in enumerate(dealt)}


def deal_experts(num_experts: int, num_folders: int, copies: int) -> list[frozenset[int]]:
    """Experts of each folder: each expert in `copies` of them, all about equally full.

    What a node that is lost had lies spread over many others. Raises ConfigurationError.
    """
    if copies > num_folders:
        raise ConfigurationError(
            f"--copies {copies}: each copy of an expert needs a folder of its own, and there are {num_folders} "
            "(--experts)"
        )
    if num_folders > num_experts * copies:
        raise ConfigurationError(
            f"--experts {num_folders}: {num_experts} experts in {copies} copies fill {num_experts * copies} folders "
            "at most"
        )
    # Folders are nodes with room for all, each on a host of its own.
    width = len(str(num_folders))
    names = [NodeId(f"{number:0{width}}") for number in range(num_folders)]
    nodes = [ExpertNodeCapacity(name, name, num_experts, "") for name in names]
    held = place_shards([ShardId(0, expert, 0) for expert in range(num_experts)], 1, nodes, copies, {}).shards_of()
    return [frozenset(shard.expert for shard in held[name]) for name in names]
