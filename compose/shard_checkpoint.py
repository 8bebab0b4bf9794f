"""A checkpoint cut into one folder a role, for nodes that share no disk with others.

    DIR/router     config and tokenizer, no weights
    DIR/stage-N    one layer range each
    DIR/expert-N   whole experts, of all MoE layers

Each is a checkpoint directory with a manifest (`common/checkpoint/part.py`) that a process takes as its MODEL. No
torch: weights go from file to file (`tensor_copy.py`), so memory is needed for neither the model nor a part.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint.directory import WEIGHTS_INDEX, read_tensor_index, resolve_model, served_name
from common.checkpoint.model_config import read_model_config
from common.checkpoint.part import MANIFEST, SeenCheckpoint, see_checkpoint, write_manifest
from common.checkpoint.tensor_names import check_tensors, unused_tensors
from common.errors import ConfigurationError
from common.topology import CheckpointPart
from compose.part_plan import plan_parts
from compose.tensor_copy import NamedTensor, tensors_of, write_tensors

TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model", "additional_chat_templates/*.jinja")
"""What a router reads besides weights, as far as a checkpoint has it."""


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """One folder."""

    name: str
    part: CheckpointPart
    num_bytes: int
    """Of its weights."""


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
        WrittenPart(name, part, sum(tensor.stored.num_bytes for tensor in tensors[name]))
        for name, part in parts.items()
    ]
    output = Path(os.path.expanduser(output)).absolute()  # Path.expanduser raises where the user has no home
    try:
        workplace = _make_workplace(output, sum(part.num_bytes for part in written))
        try:
            for part in written:
                on_part(part)
                whole = SeenCheckpoint(seen.fingerprint, part.part, served_name(model, source))
                _write_part(workplace / part.name, source, whole, tensors[part.name], pp)
            _open_to_all(workplace)
            os.rename(workplace, output)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be written: {error}") from None
    return written


def _make_workplace(output: Path, num_bytes: int) -> Path:
    """A folder beside `output`, on a disk with room for everything."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"--output {output} is not empty: it must be a new or an empty folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if num_bytes > free:
        raise ConfigurationError(f"--output {output}: the parts need {num_bytes} bytes, and its disk has {free} free")
    return Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))


def _write_part(directory: Path, source: Path, seen: SeenCheckpoint, tensors: list[NamedTensor], pp: int) -> None:
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


def _open_to_all(workplace: Path) -> None:
    """It was made for its owner alone; processes of a mesh may read as other users."""
    workplace.chmod(0o755)
    for path in workplace.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
