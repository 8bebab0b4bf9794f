"""Tensors of a checkpoint into a new file, byte by byte: nothing is loaded, and no bit can change. No torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from common.checkpoint.directory import StoredTensor
from common.checkpoint.model_config import ModelConfig
from common.checkpoint.tensor_names import expert_tensors, fused_expert_tensors, is_fused, stage_tensors
from common.errors import CheckpointError
from common.topology import CheckpointPart

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor under the name that it gets, and where its bytes are."""

    name: str
    stored: StoredTensor


def tensors_of(config: ModelConfig, index: Mapping[str, StoredTensor], part: CheckpointPart) -> list[NamedTensor]:
    """What a part needs of a whole checkpoint that `check_tensors` has found complete.

    Experts that are stored as one come out one by one, as every node can read them.
    """
    found: list[NamedTensor] = []
    if part.layers is not None:
        found += [NamedTensor(name, index[name]) for name, _ in stage_tensors(config, index, part.layers)]
    for layer in config.moe_layer_indices if part.experts else ():
        for expert in sorted(part.experts):
            if is_fused(config, index, layer, expert):
                found += _cut_out(config, index, layer, expert)
            else:
                found += [NamedTensor(name, index[name]) for name, _ in expert_tensors(config, layer, [expert])]
    return found


def write_tensors(path: Path, tensors: Sequence[NamedTensor]) -> None:
    """Make `path` a safetensors file of these. Raises OSError, or CheckpointError for a source that is damaged."""
    # Wide items first: then each tensor begins at a multiple of its item's size, as readers that map the file like it.
    ordered = sorted(tensors, key=lambda tensor: -_item_bytes(tensor))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        stored = tensor.stored
        if stored.num_bytes != math.prod(stored.shape) * _item_bytes(tensor):
            raise CheckpointError(
                f"tensor {tensor.name} of {stored.file} has {stored.num_bytes} bytes, "
                f"{math.prod(stored.shape)} numbers of {stored.dtype} are announced"
            )
        header[tensor.name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [end, end + stored.num_bytes],
        }
        end += stored.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with ExitStack() as opened, path.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        sources: dict[Path, BinaryIO] = {}
        for tensor in ordered:
            file = tensor.stored.file
            if file not in sources:
                sources[file] = opened.enter_context(file.open("rb"))
            _copy(sources[file], tensor.stored, target)


def _copy(source: BinaryIO, stored: StoredTensor, target: BinaryIO) -> None:
    source.seek(stored.start)
    left = stored.num_bytes
    while left:
        chunk = source.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise CheckpointError(f"{stored.file} has become shorter while it was read")
        target.write(chunk)
        left -= len(chunk)


def _item_bytes(tensor: NamedTensor) -> int:
    return ITEM_BYTES[tensor.stored.dtype]


def _cut_out(config: ModelConfig, index: Mapping[str, StoredTensor], layer: int, expert: int) -> list[NamedTensor]:
    """Gate, up and down of one expert; each is one run of bytes in what is stored as one."""
    (gate_up_name, _), (down_name, _) = fused_expert_tensors(config, layer)
    gate_up = _nth_of(config.num_experts, expert, index[gate_up_name])
    pieces = (_nth_of(2, 0, gate_up), _nth_of(2, 1, gate_up), _nth_of(config.num_experts, expert, index[down_name]))
    named = expert_tensors(config, layer, [expert])
    return [NamedTensor(name, replace(piece, shape=shape)) for (name, shape), piece in zip(named, pieces, strict=True)]


def _nth_of(count: int, number: int, stored: StoredTensor) -> StoredTensor:
    size = stored.num_bytes // count
    return replace(stored, start=stored.start + number * size, num_bytes=size)
