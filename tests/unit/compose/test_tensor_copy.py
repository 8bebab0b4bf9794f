"""Tensors come over as they are, whatever form the checkpoint has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint.directory import read_tensor_index
from common.checkpoint.model_config import read_model_config
from common.checkpoint.tensor_names import check_tensors
from common.errors import CheckpointError
from common.topology import CheckpointPart, LayerRange
from compose.shard_checkpoint import tensors_of, write_tensors
from tests.support.checkpoints.fused_experts import fuse_experts
from tests.support.checkpoints.tiny_checkpoints import (
    MIXTRAL_SHARDED,
    QWEN3,
    QWEN3_DENSE_LAYERS,
    Recipe,
    write_checkpoint,
)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def whole(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def copied(directory: Path, part: CheckpointPart, target: Path) -> dict[str, torch.Tensor]:
    write_tensors(target, tensors_of(read_model_config(directory), read_tensor_index(directory), part))
    return load_file(target)


PARTS = (CheckpointPart(LayerRange(0, 2)), CheckpointPart(LayerRange(2, 5)), CheckpointPart(experts=frozenset({0, 4})))


@pytest.mark.parametrize("part", PARTS, ids=["first", "middle", "experts"])
@pytest.mark.parametrize("recipe", [QWEN3, MIXTRAL_SHARDED, QWEN3_DENSE_LAYERS], ids=lambda recipe: recipe.name)
def test_every_bit_is_that_of_the_whole_and_nothing_is_missing(
    recipe: Recipe, part: CheckpointPart, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model", recipe)
    (tmp_path / "part").mkdir()
    original = whole(directory)
    found = copied(directory, part, tmp_path / "part" / "model.safetensors")
    check_tensors(read_model_config(directory), read_tensor_index(tmp_path / "part"), part)
    assert {name: bits(value) for name, value in found.items()} == {name: bits(original[name]) for name in found}


def test_experts_that_are_stored_as_one_come_out_one_by_one(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", QWEN3)
    original = whole(directory)
    fused = fuse_experts(directory, tmp_path / "fused")
    assert not any("experts.3" in name for name in whole(fused))
    found = copied(fused, CheckpointPart(experts=frozenset({0, 3, 5})), tmp_path / "part.safetensors")
    assert found.keys() == {name for name in original if any(f"experts.{expert}." in name for expert in (0, 3, 5))}
    assert {name: bits(value) for name, value in found.items()} == {name: bits(original[name]) for name in found}


def test_tensors_of_several_widths_lie_at_multiples_of_their_items(tmp_path: Path) -> None:
    save_file({"half": torch.ones(3, dtype=torch.bfloat16), "full": torch.ones(2)}, tmp_path / "model.safetensors")
    index = read_tensor_index(tmp_path)
    (tmp_path / "part").mkdir()
    write_tensors(tmp_path / "part/model.safetensors", {name: index[name] for name in ("half", "full")})
    assert {name: stored.start % 4 for name, stored in read_tensor_index(tmp_path / "part").items()} == {
        "full": 0,
        "half": 0,
    }
    assert load_file(tmp_path / "part/model.safetensors")["half"].tolist() == [1, 1, 1]


def test_a_source_that_is_cut_off_meanwhile_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    stored = read_tensor_index(tmp_path)["a"]
    stored.file.write_bytes(stored.file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="has become shorter"):
        write_tensors(tmp_path / "part.safetensors", {"a": stored})
