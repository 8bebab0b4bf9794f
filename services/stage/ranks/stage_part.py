"""What a rank other than the first has of a stage's layers: no norms, no gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.checkpoint.model_config import ModelConfig
from common.compute.gated_ffn import GatedExpert
from services.stage.model.embedding import Embedding
from services.stage.model.joined_parts import AttentionPart, DenseColumns
from services.stage.model.part_loading import PartLoader
from services.stage.model.rope import RotaryTable
from services.stage.ranks.commands import LoadOrder


@dataclass(frozen=True, slots=True)
class StagePart:
    """By layer, from the stage's first."""

    attention: tuple[AttentionPart, ...]
    dense: tuple[DenseColumns | None, ...]
    """None for a layer with experts."""
    embedding: Embedding | None
    lm_head: Callable[[Tensor], Tensor] | None
    rotary: RotaryTable
    dtype: torch.dtype


def load_part(
    loader: PartLoader, config: ModelConfig, order: LoadOrder, rotary: RotaryTable, dtype: torch.dtype
) -> StagePart:
    """Raises CheckpointError for a tensor that is missing or has another shape."""
    layers = range(order.first_layer, order.stop_layer)
    dense = [None if config.moe_layers[layer] else loader.dense(layer) for layer in layers]
    assert not any(isinstance(part, GatedExpert) for part in dense), "there are several ranks"
    return StagePart(
        attention=tuple(loader.attention(layer) for layer in layers),
        dense=tuple(None if isinstance(part, GatedExpert) else part for part in dense),
        embedding=loader.embedding() if order.is_first else None,
        lm_head=loader.lm_head() if order.is_last else None,
        rotary=rotary,
        dtype=dtype,
    )
