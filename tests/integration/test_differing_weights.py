"""An expert node whose checkpoint differs where the fingerprint has no sample is found before anybody asks it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from common.checkpoint.directory import _SAMPLE_BYTES, _sample_positions, fingerprint
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.served.mesh_client import Ask
from tests.support.served.served_mesh import served_mesh

ASKS = (Ask("A mesh serves one model.", 24, num_top_logprobs=3, ignore_eos=True),)


def change_a_weight_that_no_sample_sees(directory: Path) -> str:
    """Of an expert; its name."""
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    sampled = [range(start, start + _SAMPLE_BYTES) for start in _sample_positions(len(content))]
    for name, tensor in header.items():
        if ".experts." in name and "down_proj" in name:
            start = 8 + length + tensor["data_offsets"][0]
            for place in range(start, 8 + length + tensor["data_offsets"][1], 4):
                if not any(place in seen for seen in sampled):
                    (value,) = struct.unpack_from("<f", content, place)
                    struct.pack_into("<f", content, place, value + 0.25)
                    file.write_bytes(content)
                    return str(name)
    raise AssertionError("every byte is in a sample")


def test_a_node_with_one_other_weight_is_refused_by_name_and_changes_no_token(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    other = tmp_path / "other" / "tiny"
    shutil.copytree(model, other)
    changed = change_a_weight_that_no_sample_sees(other).split(".")
    assert fingerprint(other) == fingerprint(model)
    with served_mesh(model, {"EXPERTS": "1", "COPIES": "2"}) as mesh:
        before = mesh.client.ask_all(ASKS)
        ended = subprocess.run(
            [sys.executable, "-m", "services.expert"],
            env=os.environ | {"MODEL": str(other), "STATE_DIR": str(mesh.local.state_dir), "PORT": "0"},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        sentence = ended.stderr.splitlines()[-1]
        assert ended.returncode == 1, sentence
        assert f"layer {changed[2]}, expert {changed[5]}" in sentence
        assert "checkpoints differ" in sentence
        assert fingerprint(model) in sentence
        assert '"node_refused"' in mesh.local.logs("router-0").read_text()
        assert mesh.client.ask_all(ASKS) == before
