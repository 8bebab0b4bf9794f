"""What a process makes of a folder with a part, and of one that is not what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from common.checkpoint.model_config import read_model_config
from common.checkpoint.part import MANIFEST, SeenCheckpoint, refuse_useless_part, see_checkpoint
from common.errors import CheckpointError, ConfigurationError
from common.topology import CheckpointPart, LayerRange, NodeKind
from compose.shard_checkpoint import shard_checkpoint
from compose.tiny_checkpoint import write_tiny_checkpoint

STAGE = CheckpointPart(layers=LayerRange(0, 3))
EXPERT = CheckpointPart(experts=frozenset({2, 0}))
ROUTER = CheckpointPart()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parts")
    model = write_tiny_checkpoint(directory / "tiny")
    shard_checkpoint(str(model), directory / "parts", 2, 2, 2)
    return directory / "parts"


@pytest.fixture(params=["stage-0", "expert-1", "router"])
def part(request: pytest.FixtureRequest, parts: Path, tmp_path: Path) -> Path:
    """A copy of one, to be damaged."""
    return Path(shutil.copytree(parts / request.param, tmp_path / request.param))


@pytest.fixture
def stage(parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parts / "stage-0", tmp_path / "a-stage"))


def see(directory: Path) -> SeenCheckpoint:
    return see_checkpoint(directory, read_model_config(directory))


def rewrite(directory: Path, **changes: Any) -> None:
    manifest = json.loads((directory / MANIFEST).read_text()) | changes
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_a_tensor_that_is_missing_is_named(stage: Path) -> None:
    tensors = load_file(stage / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, stage / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"tensor model\.layers\.1\.self_attn\.k_proj\.weight is missing in .*a-stage"
    ):
        see(stage)


def test_weights_that_were_changed_are_found(stage: Path) -> None:
    content = bytearray((stage / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (stage / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a-stage is not as it was written: .*copy it again"):
        see(stage)


def test_weights_that_were_cut_off_are_named(stage: Path) -> None:
    content = (stage / "model.safetensors").read_bytes()
    (stage / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"a-stage/model\.safetensors is cut off"):
        see(stage)


def test_the_config_of_another_model_is_found(part: Path) -> None:
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(CheckpointError, match="is not as it was written"):
        see(part)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 2}, "version must be 1, not 2"),
        ({"layers": [0, 5]}, r"layers must be a range of the model's 4 layers, not \[0, 5\]"),
        ({"layers": [2, 2]}, "layers must be a range"),
        ({"layers": [0, 1, 2]}, "layers must be a range"),
        ({"layers": "all"}, "layers must be a range"),
        ({"layers": [-1, 2]}, "layers must be a range"),
        ({"experts": [8]}, "experts must be a list of numbers below 8"),
        ({"experts": None}, "experts must be a list"),
        ({"experts": [True]}, "experts must be a list"),
        ({"source_fingerprint": ""}, "source_fingerprint must be a non-empty string"),
        ({"model": 5}, "model must be a non-empty string"),
    ],
    ids=str,
)
def test_a_field_of_the_manifest_that_makes_no_sense_is_named(stage: Path, changes: dict[str, Any], named: str) -> None:
    rewrite(stage, **changes)
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: {named}"):
        see(stage)


def test_a_manifest_that_is_no_json_is_named(stage: Path) -> None:
    (stage / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=MANIFEST):
        see(stage)


def test_more_than_there_is_cannot_be_claimed(stage: Path) -> None:
    rewrite(stage, layers=[0, 3])
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.2\.input_layernorm\.weight is missing"):
        see(stage)


def test_a_disk_that_fails_while_the_manifest_is_looked_for_is_a_sentence(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_model_config(stage)

    def fail(self: Path) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "exists", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        see_checkpoint(stage, config)


@pytest.mark.parametrize(
    ("part", "kind"),
    [(None, NodeKind.STAGE), (None, None), (STAGE, NodeKind.STAGE), (EXPERT, NodeKind.EXPERT), (ROUTER, None)],
)
def test_each_process_takes_the_whole_or_the_part_of_its_kind(
    part: CheckpointPart | None, kind: NodeKind | None
) -> None:
    refuse_useless_part(part, kind, "folder")


@pytest.mark.parametrize(
    ("part", "kind", "sentence"),
    [
        (EXPERT, NodeKind.STAGE, r"MODEL=folder holds experts 0, 2: this process \(stage\) needs .* the part stage-N"),
        (ROUTER, NodeKind.STAGE, "MODEL=folder holds no weights: .* the part stage-N"),
        (STAGE, NodeKind.EXPERT, r"MODEL=folder holds layers \[0, 3\): .* the part expert-N"),
        (STAGE, None, r"this process \(router\) needs the whole checkpoint or the part router"),
    ],
)
def test_the_part_of_another_kind_is_refused_with_what_would_be_right(
    part: CheckpointPart, kind: NodeKind | None, sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        refuse_useless_part(part, kind, "folder")
