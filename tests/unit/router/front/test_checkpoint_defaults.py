from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError
from services.router.front.checkpoint_defaults import read_checkpoint_defaults


def write(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_end_of_sequence_ids_of_both_files_count(tmp_path: Path) -> None:
    write(tmp_path, config={"eos_token_id": 2, "vocab_size": 9}, generation_config={"eos_token_id": [3, 4]})
    defaults = read_checkpoint_defaults(tmp_path)
    assert defaults.eos_token_ids == {2, 3, 4}
    assert defaults.vocabulary_size == 9


def test_sampling_defaults_are_the_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, config={}, generation_config={"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True})
    defaults = read_checkpoint_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.95, 20)


def test_penalties_of_the_checkpoint_count_as_in_vllm(tmp_path: Path) -> None:
    write(tmp_path, config={}, generation_config={"repetition_penalty": 1.05, "min_p": 0.1})
    defaults = read_checkpoint_defaults(tmp_path)
    assert (defaults.repetition_penalty, defaults.min_p) == (1.05, 0.1)


def test_a_penalty_that_divides_by_zero_is_refused(tmp_path: Path) -> None:
    write(tmp_path, config={}, generation_config={"repetition_penalty": 0})
    with pytest.raises(CheckpointError, match="repetition_penalty"):
        read_checkpoint_defaults(tmp_path)


def test_without_files_sampling_is_plain(tmp_path: Path) -> None:
    defaults = read_checkpoint_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (1.0, 1.0, 0)
    assert (defaults.min_p, defaults.repetition_penalty) == (0.0, 1.0)
    assert defaults.eos_token_ids == frozenset()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_checkpoint_defaults(tmp_path)
