"""A checkpoint cut into one folder per role, for nodes that share no disk with others.

    DIR/router     config and tokenizer, no weights
    DIR/stage-N    one layer range each
    DIR/expert-N   whole experts, of all MoE layers

Each is a checkpoint directory with a manifest (`common/checkpoint/part.py`) that a process takes as its MODEL. No
torch: weights go from file to file, byte by byte, so memory is needed for neither the model nor a part, and no bit can
change.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from common.checkpoint.directory import (
    NUMBER_BYTES,
    WEIGHTS_INDEX,
    StoredTensor,
    read_tensor_index,
    resolve_model,
    served_name,
)
from common.checkpoint.model_config import ModelConfig, read_model_config
from common.checkpoint.part import MANIFEST, SeenCheckpoint, see_checkpoint, write_manifest
from common.checkpoint.tensor_names import (
    check_tensors,
    expert_tensors,
    fused_expert_tensors,
    is_fused,
    stage_tensors,
    unused_tensors,
)
from common.errors import CheckpointError, ConfigurationError
from common.topology import CheckpointPart
from compose.checkpoint_folder import whole_folder
from compose.part_plan import plan_parts

TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model", "additional_chat_templates/*.jinja")
"""What a router reads besides weights, as far as a checkpoint has it."""


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """One folder."""

    name: str
    part: CheckpointPart
    num_bytes: int
    """The bytes of its weights."""


def shard_checkpoint(
    model: str,
    output: Path,
    pp: int,
    num_expert_folders: int,
    copies: int,
    on_part: Callable[[WrittenPart], None] = lambda part: None,
) -> list[WrittenPart]:
    """Make `output`, which is new or empty, the folder of all parts of MODEL. Others see all of them or none.

    `on_part` is told of each before it is written. Raises ConfigurationError (an option, no room) or CheckpointError.
    """
    source = resolve_model(model)
    config = read_model_config(source)
    seen = see_checkpoint(source, config)
    if seen.part is not None:
        raise ConfigurationError(f"--model {model} is a part already: parts are cut from the whole checkpoint")
    index = read_tensor_index(source)
    check_tensors(config, index)
    unused_tensors(config, index)  # one that contradicts the config is refused here as by a router
    parts = plan_parts(config, pp, num_expert_folders, copies)
    tensors = {name: tensors_of(config, index, part) for name, part in parts.items()}
    written = [
        WrittenPart(name, part, sum(stored.num_bytes for stored in tensors[name].values()))
        for name, part in parts.items()
    ]
    output = Path(os.path.expanduser(output)).absolute()  # Path.expanduser raises where the user has no home
    try:
        _refuse_without_room(output, sum(part.num_bytes for part in written))
        with whole_folder(output) as workplace:
            for part in written:
                on_part(part)
                whole = SeenCheckpoint(seen.fingerprint, part.part, served_name(model, source))
                _write_part(workplace / part.name, source, whole, tensors[part.name], pp)
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be written: {error}") from None
    return written


def _refuse_without_room(output: Path, num_bytes: int) -> None:
    """Raises ConfigurationError for a folder that is not empty, or on a disk that has not enough left. Raises
    OSError."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"--output {output} is not empty: it must be a new or an empty folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if num_bytes > free:
        raise ConfigurationError(f"--output {output}: the parts need {num_bytes} bytes, and its disk has {free} free")


def _write_part(
    directory: Path, source: Path, seen: SeenCheckpoint, tensors: Mapping[str, StoredTensor], pp: int
) -> None:
    directory.mkdir()
    if tensors:
        shutil.copyfile(source / "config.json", directory / "config.json")
        write_tensors(directory / "model.safetensors", tensors)
    else:
        _copy_texts(source, directory)
    write_manifest(directory, seen, pp)


def _copy_texts(source: Path, directory: Path) -> None:
    for pattern in TEXT_FILES:
        for file in source.glob(pattern):
            if file.name not in (WEIGHTS_INDEX, MANIFEST):
                target = directory / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


CHUNK_BYTES = 16 << 20


def tensors_of(config: ModelConfig, index: Mapping[str, StoredTensor], part: CheckpointPart) -> dict[str, StoredTensor]:
    """Returns what a part needs of a whole checkpoint that `check_tensors` has found complete: where the bytes of each
    tensor are, by the name that it gets.

    Experts that are stored as one come out one by one, as every node can read them.
    """
    found: dict[str, StoredTensor] = {}
    if part.layers is not None:
        found |= {name: index[name] for name, _ in stage_tensors(config, index, part.layers)}
    for layer in config.moe_layer_indices if part.experts else ():
        for expert in sorted(part.experts):
            if is_fused(config, index, layer, expert):
                found |= _cut_out(config, index, layer, expert)
            else:
                found |= {name: index[name] for name, _ in expert_tensors(config, layer, [expert])}
    return found


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Make `path` a safetensors file of these. Raises OSError, or CheckpointError for a source that is damaged."""
    # Wide items first: then each tensor begins at a multiple of its item's size, as readers that map the file like it.
    ordered = sorted(tensors.items(), key=lambda named: -NUMBER_BYTES[named[1].dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in ordered:
        header[name] = {
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
        for _, stored in ordered:
            if stored.file not in sources:
                sources[stored.file] = opened.enter_context(stored.file.open("rb"))
            _copy(sources[stored.file], stored, target)


def _copy(source: BinaryIO, stored: StoredTensor, target: BinaryIO) -> None:
    source.seek(stored.start)
    left = stored.num_bytes
    while left:
        chunk = source.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise CheckpointError(f"{stored.file} has become shorter while it was read")
        target.write(chunk)
        left -= len(chunk)


def _cut_out(
    config: ModelConfig, index: Mapping[str, StoredTensor], layer: int, expert: int
) -> dict[str, StoredTensor]:
    """Returns gate, up and down of one expert; each is one run of bytes in what is stored as one."""
    (gate_up_name, _), (down_name, _) = fused_expert_tensors(config, layer)
    gate_up = _nth_of(config.num_experts, expert, index[gate_up_name])
    pieces = (_nth_of(2, 0, gate_up), _nth_of(2, 1, gate_up), _nth_of(config.num_experts, expert, index[down_name]))
    named = expert_tensors(config, layer, [expert])
    return {name: replace(piece, shape=shape) for (name, shape), piece in zip(named, pieces, strict=True)}


def _nth_of(count: int, number: int, stored: StoredTensor) -> StoredTensor:
    size = stored.num_bytes // count
    return replace(stored, start=stored.start + number * size, num_bytes=size)
