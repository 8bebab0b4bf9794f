"""A folder with a part of a checkpoint, as `moemesh shard` writes it: what it holds, and of which whole. No torch.

Layout: that of a checkpoint directory with no other tensors than the part's, and `moemesh-part.json`. The part for a
router has no tensors at all. Nodes take a part or the whole alike; they register with the fingerprint of the whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from common.atomic_write import write_whole
from common.checkpoint.directory import fingerprint, read_json, read_tensor_index
from common.checkpoint.model_config import ModelConfig
from common.checkpoint.tensor_names import check_tensors
from common.errors import CheckpointError, ConfigurationError
from common.topology import CheckpointPart, LayerRange, NodeKind

MANIFEST = "moemesh-part.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class SeenCheckpoint:
    """What lies in the folder that MODEL names."""

    fingerprint: str
    """The fingerprint of the whole checkpoint."""
    part: CheckpointPart | None = None
    """None: the whole lies there."""
    model: str = ""
    """For a part, the name of the whole checkpoint."""


def see_checkpoint(directory: Path, config: ModelConfig) -> SeenCheckpoint:
    """Returns a part, or the whole; `config` is the one that lies there.

    Raises CheckpointError for a part that lacks a tensor (by its name) or is not as it was written.
    """
    path = directory / MANIFEST
    try:
        is_part = path.exists()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked for: {error}") from None
    if not is_part:
        return SeenCheckpoint(fingerprint(directory))
    manifest = read_json(path)
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version must be {VERSION}, not {manifest.get('version')!r}: write the part anew"
        )
    part = CheckpointPart(_layers(manifest, path, config), _experts(manifest, path, config))
    has_weights = part.layers is not None or bool(part.experts)
    if has_weights:
        check_tensors(config, read_tensor_index(directory), part, str(directory))
    if fingerprint(directory, has_weights=has_weights) != manifest.get("own_fingerprint"):
        raise CheckpointError(
            f"{directory} is not as it was written: its config.json or weights are damaged, or of another model; "
            "copy it again"
        )
    return SeenCheckpoint(_text(manifest, path, "source_fingerprint"), part, _text(manifest, path, "model"))


def write_manifest(directory: Path, seen: SeenCheckpoint, pp: int) -> None:
    """Say what `directory` holds, once all else lies there. `pp`: of the plan that its layers are from, for people."""
    part = seen.part or CheckpointPart()
    manifest = {
        "version": VERSION,
        "model": seen.model,
        "source_fingerprint": seen.fingerprint,
        "own_fingerprint": fingerprint(directory, has_weights=part != CheckpointPart()),
        "pp": pp,
        "layers": part.layers,
        "experts": sorted(part.experts),
    }
    write_whole(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def refuse_useless_part(part: CheckpointPart | None, kind: NodeKind | None, model: str) -> None:
    """Raises ConfigurationError for a node whose part has nothing that its kind loads. None: the router, whose part has
    a tokenizer and no weights."""
    if part is None:
        return
    is_useful, folder = {
        NodeKind.STAGE: (part.layers is not None, "stage-N"),
        NodeKind.EXPERT: (bool(part.experts), "expert-N"),
        None: (part == CheckpointPart(), "router"),
    }[kind]
    if not is_useful:
        raise ConfigurationError(
            f"MODEL={model} holds {describe_part(part)}: this process ({kind or 'router'}) needs the whole checkpoint "
            f"or the part {folder}"
        )


def describe_part(part: CheckpointPart) -> str:
    """Returns it in words."""
    found = [f"layers [{part.layers.start}, {part.layers.stop})"] if part.layers is not None else []
    found += [f"experts {', '.join(map(str, sorted(part.experts)))}"] if part.experts else []
    return " and ".join(found) or "no weights"


def _layers(manifest: dict[str, Any], path: Path, config: ModelConfig) -> LayerRange | None:
    value = manifest.get("layers")
    if value is None:
        return None
    if not _is_list_of_numbers(value) or len(value) != 2 or not value[0] < value[1] <= config.num_layers:
        raise CheckpointError(
            f"{path}: layers must be a range of the model's {config.num_layers} layers, not {value!r}"
        )
    return LayerRange(*value)


def _experts(manifest: dict[str, Any], path: Path, config: ModelConfig) -> frozenset[int]:
    value = manifest.get("experts")
    if not _is_list_of_numbers(value) or any(expert >= config.num_experts for expert in value):
        raise CheckpointError(f"{path}: experts must be a list of numbers below {config.num_experts}, not {value!r}")
    return frozenset(value)


def _is_list_of_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _text(manifest: dict[str, Any], path: Path, key: str) -> str:
    value = manifest.get(key)
    if not isinstance(value, str) or not value:
        raise CheckpointError(f"{path}: {key} must be a non-empty string, not {value!r}")
    return value
