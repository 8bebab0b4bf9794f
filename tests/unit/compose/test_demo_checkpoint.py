"""The demo model is complete where it lies, and where it is copied to."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.checkpoint.model_config import read_model_config
from common.errors import CheckpointError
from compose.demo_checkpoint import DEMO_CHECKPOINT, copy_demo_checkpoint

MAX_BYTES = 10_000_000


def test_the_demo_model_is_a_small_mixture_of_experts() -> None:
    assert read_model_config(DEMO_CHECKPOINT).num_experts == 8
    assert (DEMO_CHECKPOINT / "model.safetensors").stat().st_size < MAX_BYTES


def test_a_copy_has_all_files_and_replaces_what_was_there(tmp_path: Path) -> None:
    directory = tmp_path / "volume" / "demo"
    directory.mkdir(parents=True)
    (directory / "old").write_text("of an older version")
    copied = {path.name: path.read_bytes() for path in copy_demo_checkpoint(directory).iterdir()}
    assert copied == {path.name: path.read_bytes() for path in DEMO_CHECKPOINT.iterdir()}
    assert [path.name for path in directory.parent.iterdir()] == ["demo"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the demo model"):
        copy_demo_checkpoint(tmp_path / "file" / "demo")
