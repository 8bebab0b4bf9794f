"""A small model, a small mesh and its nodes, as plain values."""

from __future__ import annotations

from typing import Any

from common.checkpoint.model_config import ModelConfig, parse_model_config
from common.ids import Incarnation, NodeId
from common.topology import NodeDescription, NodeKind
from services.router.control.sizes import MeshShape

LAYERS, EXPERTS = 4, 3
SHARD_BYTES = 3 * 64 * 32 * 4
PLENTY = 1 << 40


def small_model(**changes: Any) -> ModelConfig:
    """Four layers of three experts."""
    raw: dict[str, Any] = {
        "model_type": "qwen3_moe",
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 48,
    }
    return parse_model_config(raw | changes)


def small_mesh(**changes: Any) -> MeshShape:
    """Two slots a pipeline, two copies of each expert."""
    fields: dict[str, Any] = {
        "pp": 2,
        "spares": 0,
        "copies": 2,
        "num_slices": 1,
        "item_bytes": 4,
        "block_tokens": 32,
        "kv_cache_tokens": 1024,
    }
    return MeshShape(**(fields | changes))


def node(name: str, kind: NodeKind = NodeKind.STAGE, capacity_bytes: int = PLENTY, **changes: Any) -> NodeDescription:
    """What a node of this name says of itself; the same name is the same incarnation."""
    fields: dict[str, Any] = {
        "node_id": NodeId(name),
        "incarnation": Incarnation(1 + sum(ord(letter) << (8 * place) for place, letter in enumerate(name[:7]))),
        "kind": kind,
        "capacity_bytes": capacity_bytes,
        "host_label": f"host of {name}",
        "numeric_class": "cpu",
        "fingerprint": "print",
        "endpoints": (f"tcp://{name}:1",),
        "lifeline": (f"tcp://{name}:2",),
        "ipc_token": f"token of {name}",
    }
    return NodeDescription(**(fields | changes))
