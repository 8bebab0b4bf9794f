"""The default checkpoint is complete, always the same, and one that transformers takes without a complaint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import CheckpointError
from compose.tiny_checkpoint import FILES, SPECIAL_TOKENS, Family, is_complete, main, write_tiny_checkpoint


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("family", list(Family))
def test_same_seed_gives_same_bytes_and_another_seed_other_weights(tmp_path: Path, family: Family) -> None:
    first = contents(write_tiny_checkpoint(tmp_path / "first", family, seed=1))
    second = contents(write_tiny_checkpoint(tmp_path / "second", family, seed=1))
    other = contents(write_tiny_checkpoint(tmp_path / "other", family, seed=2))
    assert first == second
    assert set(first) == set(FILES)
    assert first["model.safetensors"] != other["model.safetensors"]
    assert sum(map(len, first.values())) < 3_000_000


def test_complete_checkpoint_is_left_alone(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model")
    (directory / "config.json").write_text("edited by its owner")
    write_tiny_checkpoint(directory, seed=7)
    assert (directory / "config.json").read_text() == "edited by its owner"


def test_empty_directory_is_filled(tmp_path: Path) -> None:
    assert is_complete(write_tiny_checkpoint(tmp_path))


def test_files_of_others_are_neither_overwritten_nor_mixed_with(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="model"):
        write_tiny_checkpoint(directory)
    assert contents(directory) == {"thesis.txt": b"precious"}
    assert list(tmp_path.iterdir()) == [directory]


def test_command_says_in_a_sentence_why_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file")]) == 2
    assert "cannot write a tiny checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("family", list(Family))
def test_transformers_finds_every_tensor_and_no_other(tmp_path: Path, family: Family) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model", family)
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, loading = loaded
    assert {name: list(found) for name, found in loading.items() if found} == {}
    assert model.dtype == torch.float32
    with safe_open(directory / "model.safetensors", framework="np") as file:
        num_parameters = sum(file.get_tensor(name).size for name in file.keys())
    assert num_parameters == model.num_parameters()


def test_chat_template_and_tokenizer_work_in_transformers(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hé, 你好 🙂"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHé, 你好 🙂<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_come_first_and_the_vocabulary_is_full(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    config = json.loads((directory / "config.json").read_text())
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == config["vocab_size"]
