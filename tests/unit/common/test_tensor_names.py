"""The list of tensors against what transformers writes, and what is said of one that does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.checkpoint import read_tensor_index
from common.errors import CheckpointError
from common.model_config import read_model_config
from common.tensor_names import check_tensors, expected_tensors
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.checkpoints import RECIPES, Recipe, write_checkpoint


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_list_is_exactly_what_transformers_writes(recipe: Recipe, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", recipe)
    config, index = read_model_config(directory), read_tensor_index(directory)
    check_tensors(config, index)
    assert {name for name, _ in expected_tensors(config, index)} == set(index)


def test_a_tensor_that_is_missing_misshapen_or_of_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "tiny")
    config, index = read_model_config(directory), dict(read_tensor_index(directory))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        check_tensors(config, {key: value for key, value in index.items() if key != name})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[1, 2\]"):
        check_tensors(config, index | {name: replace(index[name], shape=(1, 2))})
    with pytest.raises(CheckpointError, match=f"{name} is stored as I8"):
        check_tensors(config, index | {name: replace(index[name], dtype="I8")})
