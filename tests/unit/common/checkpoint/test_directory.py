"""A checkpoint directory: found, read, and where it is damaged, refused by the name of the file."""

from __future__ import annotations

import json
import pwd
import struct
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.checkpoint.directory import (
    find_weight_files,
    fingerprint,
    read_tensor_index,
    resolve_model,
    served_name,
    tensors_in_several_files,
)
from common.errors import CheckpointError, ConfigurationError

INDEX = "model.safetensors.index.json"


def write_checkpoint(directory: Path) -> Path:
    """Two files and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, directory / "one.safetensors")
    save_file({"c": torch.ones(5, 1)}, directory / "two.safetensors", metadata={"format": "pt"})
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def write_header(file: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_every_tensor_is_found_in_its_file_with_its_shape(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    found = {
        name: (stored.file.name, stored.shape, stored.dtype) for name, stored in read_tensor_index(directory).items()
    }
    assert found == {
        "a": ("one.safetensors", (2, 3), "F32"),
        "b": ("one.safetensors", (4,), "BF16"),
        "c": ("two.safetensors", (5, 1), "F32"),
    }


def test_every_tensors_bytes_are_where_the_index_says(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    numbers = torch.arange(7, dtype=torch.float32)
    save_file({"a": torch.ones(2, 3), "numbers": numbers}, directory / "one.safetensors")
    stored = read_tensor_index(directory)["numbers"]
    content = stored.file.read_bytes()[stored.start : stored.start + stored.num_bytes]
    assert content == numbers.numpy().tobytes()


@pytest.mark.parametrize(
    "names", [["one", "two"], ["weights"], ["model-00001-of-00001"], ["adapter_model"], [f"m{n}" for n in range(9)]]
)
def test_files_that_neither_an_index_nor_their_name_declares_are_no_weights(names: list[str], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError) as refused:
        read_tensor_index(tmp_path)
    said = refused.value.message
    assert "has neither model.safetensors nor model.safetensors.index.json; without one of them" in said
    assert f"{names[0]}.safetensors" in said
    assert len(said) < 400


def test_weights_in_another_format_are_told_so(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="weights must be stored as safetensors"):
        read_tensor_index(tmp_path)


def test_a_file_that_the_index_names_and_is_missing_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is listed in .*index\.json but missing"):
        read_tensor_index(directory)


def test_a_file_that_the_index_does_not_name_is_not_read(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "stray.safetensors").write_bytes(b"damaged")
    assert sorted(read_tensor_index(directory)) == ["a", "b", "c"]


def test_a_whole_file_counts_before_an_index_as_with_transformers(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    save_file({"w": torch.ones(1)}, directory / "model.safetensors")
    assert sorted(read_tensor_index(directory)) == ["w"]
    files = find_weight_files(directory)
    assert [file.name for file in files.read] == ["model.safetensors"]
    assert files.passed_over == ("one.safetensors", "two.safetensors", INDEX)
    before = fingerprint(directory)
    (directory / INDEX).write_text("{stale: nobody reads it")
    (directory / "two.safetensors").write_bytes(b"damaged")
    assert sorted(read_tensor_index(directory)) == ["w"]
    assert fingerprint(directory) == before


def test_a_second_file_beside_the_weights_is_passed_over_by_name(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"a": torch.zeros(9), "other": torch.zeros(1)}, directory / name)
    assert sorted(read_tensor_index(directory)) == ["a", "b", "c"]
    assert find_weight_files(directory).passed_over == ("adapter_model.safetensors", "consolidated.safetensors")


def test_a_folder_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it contains no weights"):
        read_tensor_index(tmp_path)


def test_of_a_tensor_in_two_files_the_last_counts_as_with_transformers(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    assert tensors_in_several_files(directory) == []
    save_file({"b": torch.ones(1), "a": torch.ones(1), "c": torch.ones(5, 1)}, directory / "two.safetensors")
    index = read_tensor_index(directory)
    assert [(index[name].file.name, index[name].shape) for name in "abc"] == [
        ("two.safetensors", (1,)),
        ("two.safetensors", (1,)),
        ("two.safetensors", (5, 1)),
    ]
    assert tensors_in_several_files(directory) == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "../../x", "a/../one.safetensors"]
)
def test_an_index_that_points_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "inner")
    write_checkpoint(tmp_path)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="outside the directory"):
        read_tensor_index(directory)


@pytest.mark.parametrize("file", [None, 3, ["one.safetensors"], {}, True], ids=str)
def test_a_file_of_the_index_that_is_no_name_is_refused_by_its_tensor(file: Any, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": file}}))
    with pytest.raises(CheckpointError, match=r"weight_map\.b must be the name of a file"):
        read_tensor_index(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[" * 99_999])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_tensor_index(directory)


@pytest.mark.parametrize("kept_bytes", [0, 3, 8, 20, -1])
def test_a_file_that_is_cut_off_is_named(kept_bytes: int, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    file = directory / "one.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"one\.safetensors.*(too short|cut off)"):
        read_tensor_index(directory)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"dtype": "F32", "shape": [1]},
        {"dtype": 3, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [1], "data_offsets": None},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]},
        {"dtype": "I64", "shape": [1], "data_offsets": [4, 0]},
    ],
    ids=str,
)
def test_a_damaged_entry_is_named_with_its_file(entry: Any, tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", {"weird.name": entry}, bytes(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: entry weird\.name"):
        read_tensor_index(tmp_path)


@pytest.mark.parametrize(
    ("header", "content_bytes"),
    [
        ({"a": ("F32", [1], [0, 4]), "b": ("F32", [1], [0, 4])}, 4),
        ({"a": ("F32", [1], [0, 4]), "b": ("F32", [1], [8, 12])}, 12),
        ({"a": ("F32", [1], [0, 4])}, 9),
        ({"a": ("F32", [1], [0, 4]), "__metadata__": ["pt"]}, 4),
        ({"a": ("F32", [1], [0, 4]), "__metadata__": {"format": {"name": "pt"}}}, 4),
    ],
    ids=str,
)
def test_what_the_nodes_would_not_load_is_refused_where_it_is_looked_at(
    header: dict[str, Any], content_bytes: int, tmp_path: Path
) -> None:
    keys = ("dtype", "shape", "data_offsets")
    entries = {
        name: dict(zip(keys, entry, strict=True)) if isinstance(entry, tuple) else entry
        for name, entry in header.items()
    }
    file = tmp_path / "model.safetensors"
    write_header(file, entries, bytes(content_bytes))
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_tensor_index(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"3", b"{", b"\xff\xfe", b"[" * 99_999])
def test_a_header_that_is_no_json_object_is_refused(header: bytes, tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_tensor_index(tmp_path)


def test_a_header_length_of_gigabytes_is_refused_without_reading_them(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 40 << 30))
        stream.truncate(50 << 30)  # sparse: takes no room on the disk
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_tensor_index(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_byte_is_a_checkpoint_error_or_changes_no_place(data: st.DataObject, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    file = directory / "one.safetensors"
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        read_tensor_index(directory)
    except CheckpointError as error:
        named = str(error)
    else:
        return
    assert "one.safetensors" in named


def test_equal_checkpoints_have_equal_fingerprints_wherever_they_are(tmp_path: Path) -> None:
    first, second = write_checkpoint(tmp_path / "first"), write_checkpoint(tmp_path / "second")
    assert fingerprint(first) == fingerprint(second)
    (second / "config.json").write_text('{ "model_type":  "mixtral" }')
    assert fingerprint(first) == fingerprint(second), "how the JSON is laid out means nothing"


def test_another_config_another_byte_or_another_name_is_another_fingerprint(tmp_path: Path) -> None:
    base = fingerprint(write_checkpoint(tmp_path / "base"))
    other = write_checkpoint(tmp_path / "config")
    (other / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    assert fingerprint(other) != base
    other = write_checkpoint(tmp_path / "byte")
    content = bytearray((other / "one.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "one.safetensors").write_bytes(content)
    assert fingerprint(other) != base
    other = write_checkpoint(tmp_path / "tensor")
    save_file({"d": torch.ones(5, 1)}, other / "two.safetensors", metadata={"format": "pt"})
    assert fingerprint(other) != base


def test_a_disk_that_fails_while_files_are_looked_for_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "exists", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Input/output error"):
        read_tensor_index(tmp_path)


def test_of_a_folder_without_weights_the_config_is_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(CheckpointError, match="it contains no weights"):
        fingerprint(tmp_path)
    before = fingerprint(tmp_path, has_weights=False)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert fingerprint(tmp_path, has_weights=False) != before


def test_a_checkpoint_without_config_has_no_fingerprint(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        fingerprint(directory)


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == (tmp_path / "model").resolve()


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c"])
def test_what_is_neither_a_directory_nor_a_hub_name_is_named(model: str) -> None:
    with pytest.raises(ConfigurationError, match=f"MODEL={model}: no such directory"):
        resolve_model(model)


def test_a_user_without_a_home_is_told_what_to_set_and_a_path_below_it_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    for name in ("HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ConfigurationError, match="MODEL=~/models/mine: no such directory"):
        resolve_model("~/models/mine")
    with pytest.raises(ConfigurationError, match="this user has none: set HF_HOME"):
        resolve_model("owner/name")
    assert served_name("~nobody-of-that-name/mine", tmp_path) == "~nobody-of-that-name/mine"
