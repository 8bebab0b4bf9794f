"""Shards that a node holds: whole, sliced, fused; tested before they are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint.model_config import read_model_config
from common.checkpoint.weights import CheckpointWeights
from common.compute.gated_ffn import GatedExpert, grouped_gated_ffn
from common.compute.native_library import NativeKernels
from common.errors import CheckpointError, ExecutionError
from common.topology import ShardId
from services.expert.shard_store import ProbeAnswer, ShardStore
from tests.support.checkpoints.tiny_checkpoints import MIXTRAL_SHARDED, QWEN3, Recipe, write_checkpoint
from tests.support.nodes.kernels import KERNEL_CHOICES, kernels_for, one_torch_thread

__all__ = ["one_torch_thread"]
WIDTH, EXPERT_WIDTH = QWEN3.width, QWEN3.expert_width


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), QWEN3)


def store_of(directory: Path, num_slices: int = 1) -> tuple[ShardStore, CheckpointWeights]:
    return ShardStore(read_model_config(directory), num_slices, torch.float32, None), CheckpointWeights(
        directory, torch.float32
    )


def output(store: ShardStore, shard: ShardId, x: torch.Tensor) -> torch.Tensor:
    expert = store.find(shard)
    assert expert is not None
    return grouped_gated_ffn(x, (0, x.shape[0]), (expert,))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def by_definition(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("recipe", [QWEN3, MIXTRAL_SHARDED], ids=lambda recipe: recipe.name)
def test_a_shard_computes_its_experts_formula(recipe: Recipe, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, recipe)
    store, weights = store_of(directory)
    store.load(weights, ShardId(1, 4, 0))
    stored = tensors_of(directory)
    names = {"qwen3_moe": "mlp.experts.4.{}.weight", "mixtral": "block_sparse_moe.experts.4.{}.weight"}[recipe.family]
    parts = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}[recipe.family]
    x = torch.randn((3, WIDTH), generator=torch.Generator().manual_seed(1))
    gate, up, down = (stored[f"model.layers.1.{names.format(part)}"] for part in parts)
    assert torch.allclose(output(store, ShardId(1, 4, 0), x), by_definition(gate, up, down, x), atol=1e-5)


@pytest.mark.parametrize("kernels", KERNEL_CHOICES)
@pytest.mark.parametrize("num_slices", [2, 3, 5, 7, EXPERT_WIDTH])
def test_slices_add_up_to_the_expert_also_where_they_are_uneven(directory: Path, num_slices: int, kernels: str) -> None:
    whole, weights = store_of(directory)
    sliced = ShardStore(read_model_config(directory), num_slices, torch.float32, kernels_for(kernels))
    whole.load(weights, ShardId(0, 2, 0))
    for piece in range(num_slices):
        sliced.load(weights, ShardId(0, 2, piece))
    x = torch.randn((4, WIDTH), generator=torch.Generator().manual_seed(2))
    total = sum(output(sliced, ShardId(0, 2, piece), x) for piece in range(num_slices))
    assert torch.allclose(torch.as_tensor(total), output(whole, ShardId(0, 2, 0), x), atol=1e-5)
    assert weights.num_bytes == 2 * 3 * WIDTH * EXPERT_WIDTH * 4, "each weight is in one slice"


@pytest.mark.parametrize("num_slices", [1, 2])
def test_experts_that_are_stored_as_one_tensor_are_the_same(directory: Path, tmp_path: Path, num_slices: int) -> None:
    """transformers 5 keeps all experts of a layer in one tensor, and some checkpoints are written so."""
    stored = tensors_of(directory)
    fused = {name: value for name, value in stored.items() if ".experts." not in name}
    for layer in range(QWEN3.layers):
        names = f"model.layers.{layer}.mlp.experts"
        part = {
            kind: torch.stack([stored[f"{names}.{expert}.{kind}.weight"] for expert in range(QWEN3.experts)])
            for kind in ("gate_proj", "up_proj", "down_proj")
        }
        fused[f"{names}.gate_up_proj"] = torch.cat((part["gate_proj"], part["up_proj"]), dim=1).contiguous()
        fused[f"{names}.down_proj"] = part["down_proj"]
    save_file(fused, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    x = torch.randn((4, WIDTH), generator=torch.Generator().manual_seed(3))
    outputs = []
    for source in (directory, tmp_path):
        store, weights = store_of(source, num_slices)
        store.load(weights, ShardId(3, 5, num_slices - 1))
        outputs.append(output(store, ShardId(3, 5, num_slices - 1), x))
        assert weights.num_bytes == 3 * WIDTH * EXPERT_WIDTH * 4 // num_slices
    assert torch.equal(*outputs)


def test_what_is_dropped_is_not_found_and_not_counted(directory: Path) -> None:
    store, weights = store_of(directory)
    shards = [ShardId(0, 0, 0), ShardId(2, 1, 0)]
    for shard in shards:
        store.load(weights, shard)
    assert sorted(store) == shards
    for shard in store:
        store.drop(shard)
        store.drop(shard)
    assert (len(store), store.find(shards[0])) == (0, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_shard_with_a_damaged_weight_never_appears(directory: Path, tmp_path: Path, value: float) -> None:
    stored = tensors_of(directory)
    stored["model.layers.0.mlp.experts.1.down_proj.weight"][3, 5] = value
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    store, weights = store_of(tmp_path)
    with pytest.raises(CheckpointError, match="expert 1 of layer 0 gives numbers that are not finite"):
        store.load(weights, ShardId(0, 1, 0))
    assert len(store) == 0
    store.load(weights, ShardId(0, 2, 0))


@pytest.mark.parametrize("shard", [ShardId(99, 0, 0), ShardId(0, 99, 0)])
def test_a_shard_that_the_checkpoint_does_not_have_is_named(directory: Path, shard: ShardId) -> None:
    store, weights = store_of(directory)
    with pytest.raises(CheckpointError, match=f"layers.{shard.layer}.mlp.experts.{shard.expert}.gate_proj"):
        store.load(weights, shard)


# ---- the probe


def probe_of(directory: Path, shard: ShardId, kernels: NativeKernels | None, dtype: torch.dtype) -> ProbeAnswer:
    store = ShardStore(read_model_config(directory), 1, dtype, kernels)
    store.load(CheckpointWeights(directory, dtype), shard)
    return store.probe(shard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", KERNEL_CHOICES)
def test_every_load_of_a_shard_answers_the_probe_with_the_same_bits(
    directory: Path, kernels: str, dtype: torch.dtype
) -> None:
    shard = ShardId(1, 4, 0)
    first = probe_of(directory, shard, kernels_for(kernels), dtype)
    assert first == probe_of(directory, shard, kernels_for(kernels), dtype)
    assert first.digest > 0
    others = [probe_of(directory, ShardId(1, expert, 0), kernels_for(kernels), dtype) for expert in (0, 1, 2, 3)]
    assert first.digest not in {other.digest for other in others}


def test_answers_of_other_kernels_are_near_and_those_of_other_weights_far(directory: Path) -> None:
    shards = [ShardId(layer, expert, 0) for layer in (0, 1) for expert in range(4)]
    native = [probe_of(directory, shard, kernels_for("native"), torch.bfloat16).projection for shard in shards]
    by_torch = [probe_of(directory, shard, None, torch.bfloat16).projection for shard in shards]
    assert max(abs(a - b) for a, b in zip(native, by_torch, strict=True)) < 0.05
    far = [abs(a - b) for number, a in enumerate(native) for b in native[:number]]
    assert sum(far) / len(far) > 0.5


def test_one_changed_weight_changes_the_digest(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, QWEN3)
    shard = ShardId(1, 4, 0)
    before = probe_of(directory, shard, None, torch.float32)
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            if name == "model.layers.1.mlp.experts.4.down_proj.weight":
                value[3, 5] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})
    assert probe_of(directory, shard, None, torch.float32).digest != before.digest


def test_kernels_that_compute_otherwise_than_torch_are_found_at_the_load(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(x: torch.Tensor, offsets: tuple[int, ...], experts: tuple[GatedExpert, ...]) -> torch.Tensor:
        answer = grouped_gated_ffn(x, offsets, experts)
        answer[-1] = answer[0]
        return answer

    store, weights = store_of(directory)
    monkeypatch.setattr("services.expert.shard_store.grouped_gated_ffn", forgetful)
    with pytest.raises(ExecutionError, match=r"expert 4 of layer 1: the kernels' answer to the probe is"):
        store.load(weights, ShardId(1, 4, 0))
    assert store.find(ShardId(1, 4, 0)) is None
