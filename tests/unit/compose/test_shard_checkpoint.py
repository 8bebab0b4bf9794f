"""The folders that `moemesh shard` writes: all or none, each one a MODEL that says what it is."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from common.checkpoint.directory import fingerprint, read_tensor_index
from common.checkpoint.model_config import read_model_config
from common.checkpoint.part import MANIFEST, see_checkpoint
from common.checkpoint.tensor_names import expected_tensors
from common.checkpoint.weights import CheckpointWeights
from common.errors import CheckpointError, ConfigurationError
from common.ids import Generation, LeaseTerm, PipelineId, SlotIndex
from common.topology import CheckpointPart, LayerRange, ShardId, StageRole, StageSlot
from compose.cli import app
from compose.shard_checkpoint import shard_checkpoint
from compose.tiny_checkpoint import write_tiny_checkpoint
from services.expert.shard_store import ShardStore
from services.router.front.text.tokenizer import TextTokenizer
from services.stage.model.layer_half.composed import ComposedHalf
from services.stage.model.loading import load_stage
from tests.support.checkpoints.tiny_checkpoints import QWEN3_TIED_SHARDED_BF16, write_checkpoint

FOLDERS = ["expert-0", "expert-1", "expert-2", "router", "stage-0", "stage-1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def parts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("output") / "parts"
    shard_checkpoint(str(model), output, 2, 3, 2)
    return output


def test_each_folder_says_which_whole_it_is_of_and_what_it_holds(model: Path, parts: Path) -> None:
    assert sorted(path.name for path in parts.iterdir()) == FOLDERS
    whole = see_checkpoint(model, read_model_config(model))
    assert whole.fingerprint == fingerprint(model)
    assert whole.part is None
    for name in FOLDERS:
        seen = see_checkpoint(parts / name, read_model_config(parts / name))
        assert (seen.fingerprint, seen.model) == (whole.fingerprint, "tiny")
        assert seen.part is not None
    assert see_checkpoint(parts / "stage-1", read_model_config(model)).part == CheckpointPart(LayerRange(2, 4))
    assert see_checkpoint(parts / "router", read_model_config(model)).part == CheckpointPart()


def test_a_folder_has_its_tensors_and_no_others(model: Path, parts: Path) -> None:
    config, index = read_model_config(model), read_tensor_index(model)
    seen: set[str] = set()
    for name in FOLDERS[:3] + FOLDERS[4:]:
        part = see_checkpoint(parts / name, config).part
        expected = {tensor for tensor, _ in expected_tensors(config, index, part)}
        assert read_tensor_index(parts / name).keys() == expected
        seen |= expected
    assert seen == index.keys()
    assert not list((parts / "router").glob("*.safetensors*"))


def test_the_routers_folder_has_the_tokenizer(model: Path, parts: Path) -> None:
    own, of_whole = (TextTokenizer.from_directory(directory) for directory in (parts / "router", model))
    assert own.encode("A mesh serves one model.") == of_whole.encode("A mesh serves one model.")
    assert own.defaults == of_whole.defaults
    assert own._chat_templates.keys() == of_whole._chat_templates.keys()


def test_a_stage_loads_from_its_folder_what_it_loads_from_the_whole(model: Path, parts: Path) -> None:
    config = read_model_config(model)
    for index, layers in enumerate((LayerRange(0, 2), LayerRange(2, 4))):
        slot = StageSlot(PipelineId(0), SlotIndex(index))
        role = StageRole(slot, layers, LeaseTerm(1), Generation(1), 2)
        loaded = [
            load_stage(CheckpointWeights(directory, torch.float32), config, role, 64, None)
            for directory in (model, parts / f"stage-{index}")
        ]
        x = torch.randn((2, config.hidden_size), generator=torch.Generator().manual_seed(3))
        first, second = (own.layers[0].half for own in loaded)
        assert isinstance(first, ComposedHalf)
        assert isinstance(second, ComposedHalf)
        assert torch.equal(first.attention.parts[0].qkv(x), second.attention.parts[0].qkv(x))
        for own in loaded:
            assert (own.embedding is not None, own.lm_head is not None) == (index == 0, index == 1)


def test_an_expert_node_loads_the_experts_of_its_folder_in_any_slices(model: Path, parts: Path) -> None:
    config = read_model_config(model)
    part = see_checkpoint(parts / "expert-1", config).part
    assert part is not None
    for num_slices in (1, 3):
        store = ShardStore(config, num_slices, torch.float32, None)
        weights = CheckpointWeights(parts / "expert-1", torch.float32)
        for layer in config.moe_layer_indices:
            for expert in part.experts:
                store.load(weights, ShardId(layer, expert, num_slices - 1))


def test_a_folder_that_holds_something_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigurationError, match=r"--output .* is not empty"):
        shard_checkpoint(str(model), tmp_path, 2, 3, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigurationError, match=r"--output .* is not empty"):
        shard_checkpoint(str(model), tmp_path / "thesis.txt", 2, 3, 2)


def test_an_empty_folder_is_filled_and_open_to_other_users(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "parts"
    output.mkdir()
    shard_checkpoint(str(model), output, 2, 3, 2)
    assert sorted(path.name for path in output.iterdir()) == FOLDERS
    assert list(tmp_path.iterdir()) == [output], "nothing is left beside it"
    modes = {path.stat().st_mode & 0o777 for path in output.rglob("*")} | {output.stat().st_mode & 0o777}
    assert modes == {0o755, 0o644}


def test_where_writing_fails_nothing_is_left(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compose.shard_checkpoint.shutil.copyfile", fail)
    with pytest.raises(ConfigurationError, match=r"--output .*parts cannot be written: .*No space left"):
        shard_checkpoint(str(model), tmp_path / "parts", 2, 3, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("compose.shard_checkpoint.shutil.disk_usage", lambda path: usage(9, 0, 9))
    with pytest.raises(ConfigurationError, match=r"the parts need \d+ bytes, and its disk has 9 free"):
        shard_checkpoint(str(model), tmp_path / "parts", 2, 3, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_not_cut_again(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a part already"):
        shard_checkpoint(str(parts / "stage-0"), tmp_path / "again", 1, 1, 1)


def test_the_command_names_each_folder_with_what_it_holds(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "parts"
    result = CliRunner().invoke(app, ["shard", "--model", str(model), "--output", str(output), "--experts", "1"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"{output}/router: no weights, 0 bytes"
    assert lines[1].startswith(f"{output}/stage-0: layers [0, 2), ")
    assert lines[3].startswith(f"{output}/expert-0: experts 0, 1, 2, 3, 4, 5, 6, 7, ")
    assert len(lines) == 4


def test_the_command_says_in_a_sentence_why_it_cannot(model: Path, tmp_path: Path) -> None:
    options = ["--model", str(model), "--output", str(tmp_path / "parts"), "--experts", "2", "--copies", "3"]
    result = CliRunner().invoke(app, ["shard", *options])
    assert result.exit_code == 1
    assert "--copies 3" in result.stderr
    assert not os.path.exists(tmp_path / "parts")


def test_a_copy_of_a_folder_is_as_good_as_the_folder(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "stage-0", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / MANIFEST).exists()
    config = read_model_config(tmp_path / "elsewhere")
    assert see_checkpoint(tmp_path / "elsewhere", config) == see_checkpoint(parts / "stage-0", config)


def test_a_stored_lm_head_of_a_tied_model_goes_with_the_last_layers(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", replace(QWEN3_TIED_SHARDED_BF16, max_shard_size="1GB"))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    shard_checkpoint(str(model), tmp_path / "parts", 2, 1, 1)
    config = read_model_config(model)
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    held = [ends & read_tensor_index(tmp_path / "parts" / name).keys() for name in ("stage-0", "stage-1")]
    assert held == [{"model.embed_tokens.weight"}, {"lm_head.weight"}]
    for name in ("stage-0", "stage-1", "expert-0", "router"):
        assert (
            see_checkpoint(tmp_path / "parts" / name, config).fingerprint == see_checkpoint(model, config).fingerprint
        )


def test_a_tensor_that_contradicts_the_config_is_in_no_part(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(1)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is in the checkpoint.*attention_bias"):
        shard_checkpoint(str(model), tmp_path / "parts", 2, 1, 1)
