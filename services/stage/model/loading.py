"""From a checkpoint to one stage's weights: the names and shapes that a layer range needs, and no others."""

from __future__ import annotations

from common.checkpoint.model_config import ModelConfig
from common.checkpoint.weights import CheckpointWeights
from common.compute.native_library import NativeKernels
from common.topology import StageRole
from services.stage.model.decoder import DecoderLayer, StageModel
from services.stage.model.part_loading import WHOLE, PartLoader
from services.stage.model.rope import RotaryTable
from services.stage.model.tp_shard import RankCut


def load_stage(
    weights: CheckpointWeights,
    config: ModelConfig,
    role: StageRole,
    num_positions: int,
    kernels: NativeKernels | None,
    cut: RankCut = WHOLE,
) -> StageModel:
    """Load what a role needs; of what is cut over ranks, one rank's part.

    Raises CheckpointError for a tensor that is missing or has another shape.
    """
    loader = PartLoader(weights, config, kernels, cut)
    layers = tuple(_layer(weights, config, loader, index) for index in range(role.layers.start, role.layers.stop))
    return StageModel(
        layers=layers,
        rotary=RotaryTable(config.rope, config.head_dim, num_positions, weights.dtype, weights.device),
        rms_norm_eps=config.rms_norm_eps,
        embedding=loader.embedding() if role.is_first else None,
        final_norm=weights.tensor("model.norm.weight", (config.hidden_size,)) if role.is_last else None,
        lm_head=loader.lm_head() if role.is_last else None,
        kernels=kernels,
    )


def _layer(weights: CheckpointWeights, config: ModelConfig, loader: PartLoader, index: int) -> DecoderLayer:
    prefix = f"model.layers.{index}"
    width = (config.hidden_size,)
    return DecoderLayer(
        index=index,
        input_norm=weights.tensor(f"{prefix}.input_layernorm.weight", width),
        attention=loader.attention(index),
        post_attention_norm=weights.tensor(f"{prefix}.post_attention_layernorm.weight", width),
        feed_forward=loader.gate(index) if config.moe_layers[index] else loader.dense(index),
    )
