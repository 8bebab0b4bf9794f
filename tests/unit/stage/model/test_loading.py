"""What a layer range reads from a checkpoint: its own tensors, and no others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.checkpoint.model_config import read_model_config
from common.checkpoint.weights import CheckpointWeights
from common.compute.gated_ffn import GatedExpert
from common.errors import CheckpointError
from common.ids import Generation, LeaseTerm, PipelineId, SlotIndex
from common.topology import LayerRange, StageRole, StageSlot
from services.stage.model.decoder import StageModel
from services.stage.model.loading import load_stage
from tests.support.checkpoints.tiny_checkpoints import (
    MIXTRAL_SHARDED,
    QWEN3,
    QWEN3_DENSE_LAYERS,
    QWEN3_TIED_SHARDED_BF16,
    write_checkpoint,
)

LAST = 2


def role(index: int, start: int, stop: int, num_slots: int = 3) -> StageRole:
    slot = StageSlot(PipelineId(0), SlotIndex(index))
    return StageRole(slot, LayerRange(start, stop), LeaseTerm(1), Generation(1), num_slots)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("qwen3"), QWEN3)


class Recorded(CheckpointWeights):
    """Remembers what was read."""

    names: list[str]

    def tensor(self, name: str, shape: tuple[int, ...], **cut: Any) -> torch.Tensor:
        self.names = [*getattr(self, "names", []), name]
        return super().tensor(name, shape, **cut)


def load(directory: Path, chosen: StageRole, dtype: torch.dtype = torch.float32) -> tuple[StageModel, Recorded]:
    weights = Recorded(directory, dtype)
    return load_stage(weights, read_model_config(directory), chosen, 64, None), weights


def test_each_stage_reads_its_layers_and_the_ends_what_ends_have(qwen3: Path) -> None:
    first, first_weights = load(qwen3, role(0, 0, 2))
    middle, middle_weights = load(qwen3, role(1, 2, 3))
    last, last_weights = load(qwen3, role(LAST, 3, 5))
    assert [len(model.layers) for model in (first, middle, last)] == [2, 1, 2]
    assert [layer.index for layer in last.layers] == [3, 4]
    assert (first.embedding is None, middle.embedding is None, last.embedding is None) == (False, True, True)
    assert (first.lm_head is None, middle.lm_head is None, last.lm_head is None) == (True, True, False)
    assert {name.split(".")[2] for name in middle_weights.names} == {"2"}
    assert "model.embed_tokens.weight" in first_weights.names
    assert {"lm_head.weight", "model.norm.weight"} <= set(last_weights.names)
    assert not any("experts" in name for name in first_weights.names + middle_weights.names + last_weights.names)


def test_all_stages_together_read_every_tensor_but_the_experts_once(qwen3: Path) -> None:
    ranges = [(0, 2), (2, 3), (3, 5)]
    read = [name for index, span in enumerate(ranges) for name in load(qwen3, role(index, *span))[1].names]
    stored: list[str] = []
    for file in qwen3.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as tensors:
            stored += tensors.keys()
    assert sorted(read) == sorted(name for name in stored if "experts" not in name)


def test_tied_embeddings_are_the_last_stages_lm_head(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, QWEN3_TIED_SHARDED_BF16)
    _, weights = load(directory, role(LAST, 5, 7), torch.bfloat16)
    assert "model.embed_tokens.weight" in weights.names
    assert "lm_head.weight" not in weights.names


@pytest.mark.parametrize("stored", ["both, equal", "both, different", "embedding alone", "lm_head alone"])
def test_the_ends_of_a_tied_model_are_those_that_transformers_loads(stored: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, replace(QWEN3_TIED_SHARDED_BF16, max_shard_size="1GB", dtype=torch.float32))
    tensors = load_file(directory / "model.safetensors")
    matrix = tensors["model.embed_tokens.weight"]
    if stored != "embedding alone":
        tensors["lm_head.weight"] = matrix.flip(0).contiguous() if stored == "both, different" else matrix.clone()
    if stored == "lm_head alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    theirs: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours, _ = load(directory, role(0, 0, 7, num_slots=1))
    assert ours.embedding is not None
    assert ours.lm_head is not None
    hidden = torch.randn((3, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(ours.embedding(torch.tensor([5, 9])), theirs.get_input_embeddings()(torch.tensor([5, 9])))
        assert torch.allclose(ours.lm_head(hidden), theirs.get_output_embeddings()(hidden), atol=1e-5)


def test_dense_layers_are_read_whole_and_others_only_their_gate(tmp_path: Path) -> None:
    model, weights = load(write_checkpoint(tmp_path, QWEN3_DENSE_LAYERS), role(0, 0, 7, num_slots=1))
    has_experts = [layer.feed_forward is None for layer in model.layers]
    assert has_experts == [False, True, False, False, False, True, False]
    assert all(isinstance(layer.feed_forward, GatedExpert | None) for layer in model.layers)
    assert "model.layers.0.self_attn.q_proj.bias" in weights.names


def test_mixtrals_gate_is_found_by_its_old_and_its_new_name(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, MIXTRAL_SHARDED)
    _, weights = load(directory, role(0, 0, 1))
    name = next(name for name in weights.names if "gate" in name)
    other = {"block_sparse_moe.gate": "mlp.gate", "mlp.gate": "block_sparse_moe.gate"}
    old, new = next((old, new) for old, new in other.items() if old in name)
    for file in directory.glob("*.safetensors"):
        save_file({key.replace(old, new): value for key, value in load_file(file).items()}, file)
    assert name.replace(old, new) in load(directory, role(0, 0, 1))[1].names


@pytest.mark.parametrize(
    ("missing", "chosen"),
    [
        ("model.embed_tokens.weight", role(0, 0, 2)),
        ("model.layers.1.self_attn.q_norm.weight", role(0, 0, 2)),
        ("model.layers.2.mlp.gate.weight", role(1, 2, 3)),
        ("lm_head.weight", role(LAST, 3, 5)),
    ],
)
def test_a_tensor_that_is_missing_is_named(qwen3: Path, tmp_path: Path, missing: str, chosen: StageRole) -> None:
    (file,) = qwen3.glob("*.safetensors")
    save_file({name: value for name, value in load_file(file).items() if name != missing}, tmp_path / file.name)
    (tmp_path / "config.json").write_text((qwen3 / "config.json").read_text())
    with pytest.raises(CheckpointError, match=f"tensor {missing} is missing"):
        load(tmp_path, chosen)


def test_a_config_that_asks_for_other_shapes_is_refused_by_the_first_tensor_that_differs(
    qwen3: Path, tmp_path: Path
) -> None:
    for file in qwen3.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((qwen3 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_key_value_heads": 4}))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight has shape \[32, 64\], config\.json asks for \[64, 64\]"):
        load(tmp_path, role(0, 0, 1))
