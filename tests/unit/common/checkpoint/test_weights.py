"""Tensors by name: the part that was asked for, in the compute dtype, or an error that names the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint.weights import CheckpointWeights
from common.errors import CheckpointError

STORED = {
    "matrix": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "half": torch.arange(4, dtype=torch.float16),
    "brain": torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16),
    "fused": torch.arange(60, dtype=torch.float32).reshape(3, 5, 4),
    "bytes": torch.ones(3, dtype=torch.uint8),
    "double": torch.ones(3, dtype=torch.float64),
    "eight": torch.ones(3).to(torch.float8_e4m3fn),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file(STORED, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_comes_in_the_compute_dtype(directory: Path, dtype: torch.dtype) -> None:
    weights = CheckpointWeights(directory, dtype)
    for name in ("matrix", "half", "brain"):
        read = weights.tensor(name, tuple(STORED[name].shape))
        assert read.dtype == dtype
        assert torch.equal(read, STORED[name].to(dtype))


def test_rows_columns_and_entries_are_cut_as_indexing_cuts_them(directory: Path) -> None:
    weights = CheckpointWeights(directory, torch.float32)
    matrix, fused = STORED["matrix"], STORED["fused"]
    assert torch.equal(weights.tensor("matrix", (6, 4), rows=slice(1, 4)), matrix[1:4])
    assert torch.equal(weights.tensor("matrix", (6, 4), columns=slice(2, 4)), matrix[:, 2:4])
    assert torch.equal(weights.tensor("matrix", (6, 4), rows=slice(0, 2), columns=slice(1, 2)), matrix[:2, 1:2])
    assert torch.equal(weights.tensor("fused", (3, 5, 4), index=2), fused[2])
    assert torch.equal(weights.tensor("fused", (3, 5, 4), index=1, rows=slice(3, 5)), fused[1, 3:])
    assert torch.equal(weights.tensor("fused", (3, 5, 4), index=0, columns=slice(0, 3)), fused[0, :, :3])


def test_only_what_was_asked_for_is_counted(directory: Path) -> None:
    weights = CheckpointWeights(directory, torch.float32)
    weights.tensor("matrix", (6, 4), rows=slice(0, 2))
    assert weights.num_bytes == 2 * 4 * 4
    weights.tensor("brain", (2,))
    assert weights.num_bytes == 2 * 4 * 4 + 2 * 4, "as converted, not as stored"


def test_what_comes_is_a_copy_of_its_own(directory: Path) -> None:
    weights = CheckpointWeights(directory, torch.float32)
    weights.tensor("matrix", (6, 4)).zero_()
    part = weights.tensor("matrix", (6, 4), columns=slice(1, 3))
    assert part.is_contiguous()
    assert torch.equal(part, STORED["matrix"][:, 1:3])
    weights.close()
    assert torch.equal(part, STORED["matrix"][:, 1:3]), "it outlives the map"


def test_a_tensor_that_is_not_there_is_named(directory: Path) -> None:
    weights = CheckpointWeights(directory, torch.float32)
    assert "matrix" in weights
    assert "other" not in weights
    with pytest.raises(CheckpointError, match="tensor other is missing"):
        weights.tensor("other", (1,))


@pytest.mark.parametrize("shape", [(4, 6), (6, 4, 1), (24,), ()])
def test_another_shape_than_the_config_asks_for_is_named(directory: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"tensor matrix has shape \[6, 4\], config.json asks for"):
        CheckpointWeights(directory, torch.float32).tensor("matrix", shape)


@pytest.mark.parametrize(("name", "stored"), [("bytes", "U8"), ("double", "F64"), ("eight", "F8_E4M3")])
def test_a_dtype_that_is_no_plain_weight_is_refused_by_name(directory: Path, name: str, stored: str) -> None:
    with pytest.raises(CheckpointError, match=f"tensor {name} is stored as {stored}; supported are F32, BF16 and F16"):
        CheckpointWeights(directory, torch.float32).tensor(name, (3,))


def test_a_file_that_vanishes_between_index_and_read_is_an_error_and_no_crash(directory: Path) -> None:
    weights = CheckpointWeights(directory, torch.float32)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be opened"):
        weights.tensor("matrix", (6, 4))


def test_offsets_that_do_not_fit_the_shape_are_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"shape":[6,4]', b'"shape":[6,3]'))
    with pytest.raises(CheckpointError):
        CheckpointWeights(directory, torch.float32).tensor("matrix", (6, 3))
