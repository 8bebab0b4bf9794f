"""A Hugging Face checkpoint directory: which tensor is in which file, its shape, and a fingerprint. No torch.

Layout: `config.json`, and the weights in `model.safetensors`, or in the files that `model.safetensors.index.json`
names: the first of the two that is there counts, as with transformers. Without either there are no weights: nothing
says which files belong to the model, and which to an adapter or to another format of the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint.config_values import shown
from common.errors import CheckpointError, ConfigurationError

_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096
WHOLE_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
NUMBER_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes of one number, by the dtypes that models are read from here."""
_MAX_HEADER_BYTES = 100_000_000
"""The same as in the safetensors library: a damaged length must not fill the memory."""
_SHOWN_FILES = 3
_HUB_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")
"""Any of these says where downloads are kept, without a home directory."""
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor is, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' word: F32, BF16, F16, ..."""
    start: int
    """Its first byte in the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """What of a checkpoint directory holds its weights."""

    read: tuple[Path, ...]
    passed_over: tuple[str, ...]
    """Names of weights, or of an index, that lie beside these and do not count."""


def resolve_model(model: str) -> Path:
    """Returns the directory that MODEL names: itself, or the local snapshot of a hub name (downloaded once).

    Raises ConfigurationError when it is neither.
    """
    directory = _expanded(model)
    if directory.is_dir():
        return directory.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigurationError(f"MODEL={model}: no such directory (and not a hub name of the form owner/name)")
    if not _expanded("~").is_absolute() and not any(os.environ.get(name) for name in _HUB_FOLDERS):
        raise ConfigurationError(
            f"MODEL={model}: hub downloads are cached in the home directory, and this user has none: set HF_HOME"
        )
    from huggingface_hub import snapshot_download  # costs 0.3 s that a local directory need not pay
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"MODEL={model}: no such directory, and it could not be downloaded from the hub: {error}"
        ) from None


def served_name(model: str, directory: Path) -> str:
    """Returns the directory's name, or a hub name as it is (its snapshot lies in a folder named by a hash)."""
    return directory.name if _expanded(model).is_dir() else model


def _expanded(path: str) -> Path:
    """Returns the path with the home directory in place of `~`; as it is where the user has none (Path.expanduser
    raises there)."""
    return Path(os.path.expanduser(path))


def read_tensor_index(directory: Path) -> Mapping[str, StoredTensor]:
    """Returns every tensor of the checkpoint by name: of one that is in several files the last, in the order of their
    names, as transformers reads it. Raises CheckpointError that names the file and what is wrong."""
    return {name: stored for file in find_weight_files(directory).read for name, stored in _tensors_of(file)}


def tensors_in_several_files(directory: Path) -> list[str]:
    """Returns their names, in order. Raises CheckpointError as `read_tensor_index`."""
    counts = Counter(name for file in find_weight_files(directory).read for name, _ in _tensors_of(file))
    return sorted(name for name, count in counts.items() if count > 1)


def _tensors_of(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    header, data_start = _safetensors_header(file)
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield (
                name,
                StoredTensor(file, tuple(entry["shape"]), str(entry["dtype"]), data_start + start, stop - start),
            )


def fingerprint(directory: Path, *, has_weights: bool = True) -> str:
    """Returns a word that is equal for equal checkpoints: config, names, shapes and samples of every file's bytes (not
    all of them: a large checkpoint would take minutes). Of a folder that is to have no weights, the config."""
    digest = hashlib.sha256()
    digest.update(json.dumps(read_json(directory / "config.json"), sort_keys=True).encode())
    for file in find_weight_files(directory).read if has_weights else ():
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        digest.update(json.dumps(_safetensors_header(file)[0], sort_keys=True).encode())
        with file.open("rb") as stream:
            for position in _sample_positions(size):
                stream.seek(position)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _sample_positions(size: int) -> Iterator[int]:
    last = max(0, size - _SAMPLE_BYTES)
    for sample in range(_SAMPLES_PER_FILE):
        yield last * sample // (_SAMPLES_PER_FILE - 1)


def find_weight_files(directory: Path) -> WeightFiles:
    """Returns which files hold the weights. Raises CheckpointError that names the file and what is wrong."""
    whole, index = directory / WHOLE_FILE, directory / WEIGHTS_INDEX
    try:
        there = sorted(file for file in directory.glob("*.safetensors") if file.is_file())
        if whole.exists():
            files, others = [whole], [WEIGHTS_INDEX] if index.exists() else []
        elif index.exists():
            files, others = _files_of_index(index), []
        else:
            raise CheckpointError(_no_weights(directory, [file.name for file in there]))
    except OSError as error:  # a disk that fails does not say that a file is missing
        raise CheckpointError(f"{directory} cannot be read: {error}") from None
    return WeightFiles(tuple(files), (*(file.name for file in there if file not in files), *others))


def _no_weights(directory: Path, others: list[str]) -> str:
    said = f"{directory} has neither {WHOLE_FILE} nor {WEIGHTS_INDEX}"
    if others:
        shown = ", ".join(others[:_SHOWN_FILES]) + (", ..." if len(others) > _SHOWN_FILES else "")
        return f"{said}; without one of them nothing says which other files hold the model's weights ({shown})"
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        return f"{said}; weights must be stored as safetensors"
    return f"{said}; it contains no weights"


def _files_of_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: weight_map.{tensor} must be the name of a file, not {shown(file)}")
    names = sorted(set(weight_map.values()))
    if any(Path(name).name != name or name == ".." for name in names):
        raise CheckpointError(f"{index}: weight_map names a file outside the directory")
    for name in names:
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index.parent / name} is listed in {index.name} but missing")
    return [index.parent / name for name in names]


def _safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """Returns the JSON header of a safetensors file (its format: 8 bytes length, header, data), and where the data
    begins."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file} is too short to be a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is cut off or not a safetensors file")
            header = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is not a JSON object")
    _check_header(file, header, size - 8 - length)
    return header, 8 + length


def _check_header(file: Path, header: Mapping[str, Any], num_bytes: int) -> None:
    """Raises CheckpointError for what the safetensors library would refuse on the nodes: tensors lie one behind the
    other, and are all that there is."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    damaged = next((name for name, entry in entries.items() if not _is_tensor_entry(entry)), None)
    if damaged is None and not _is_metadata(header.get("__metadata__")):
        damaged = "__metadata__"
    if damaged is not None:
        raise CheckpointError(f"{file}: entry {damaged} of the header is damaged")
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end > num_bytes:
        raise CheckpointError(f"{file} is cut off: {end} bytes of tensors are announced, {num_bytes} are there")
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != position:
            raise CheckpointError(
                f"{file}: entry {name} of the header is damaged: it begins at {start}, not {position}"
            )
        position = stop
    if position != num_bytes:
        raise CheckpointError(f"{file}: {num_bytes - position} unused bytes after the last tensor")


def _is_metadata(value: Any) -> bool:
    """`{"format": "pt"}`, or nothing."""
    return value is None or (isinstance(value, dict) and all(isinstance(text, str) for text in value.values()))


def _is_tensor_entry(entry: Any) -> bool:
    """`{"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}`"""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        return False
    num_bytes: int = offsets[1] - offsets[0]
    number_bytes = NUMBER_BYTES.get(entry["dtype"])
    return num_bytes >= 0 if number_bytes is None else num_bytes == math.prod(shape) * number_bytes


def read_json(path: Path, if_missing: str = "") -> dict[str, Any]:
    """Returns a JSON object. Raises CheckpointError that names the file, or says `if_missing`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        broken = _half_character(value)
    except FileNotFoundError:
        raise CheckpointError(if_missing or f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    if broken is not None:
        raise CheckpointError(
            f"{path.name}: {broken.lstrip('.')} holds half of a surrogate pair, which is not a character"
        )
    return value


def _half_character(value: Any, place: str = "") -> str | None:
    r"""Returns where a text of a JSON value has one: JSON can write it (`"\ud800"`), and it cannot be encoded."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return place
        return None
    if isinstance(value, dict):
        entries = [(f"{place}.{ascii(key)[1:-1]}", part) for key, inner in value.items() for part in (key, inner)]
    elif isinstance(value, list):
        entries = [(f"{place}[{at}]", inner) for at, inner in enumerate(value)]
    else:
        return None
    return next((found for named, part in entries if (found := _half_character(part, named)) is not None), None)
