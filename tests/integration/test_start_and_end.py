"""What starts says why it cannot, and what ends leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import MoemeshError
from common.processes.supervisor import LocalMesh
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.process_table import is_alive
from tests.support.processes.waiting import wait_until
from tests.support.served.mesh_client import Ask, mesh_client
from tests.support.served.served_mesh import READY_WITHIN_S, served_mesh

GONE_WITHIN_S = 30
SUPERVISOR = """
import sys, time
from pathlib import Path
from common.processes.supervisor import LocalMesh
with LocalMesh({"MODEL": sys.argv[1], "PORT": "0"}, Path(sys.argv[2])) as mesh:
    mesh.wait_ready(timeout_s=120)
    print(*(pid for _, pid in mesh.processes()), flush=True)
    time.sleep(600)
"""


def test_mesh_that_ends_leaves_no_process_and_every_node_leaves_in_order(tmp_path: Path) -> None:
    with served_mesh(write_tiny_checkpoint(tmp_path / "tiny")) as mesh:
        children = list(mesh.local.children.values())
        pids = [pid for _, pid in mesh.local.processes()]
        assert len(pids) == 5
        assert len(mesh.client.ask(Ask("Hello", 4, ignore_eos=True)).token_ids) == 4
    assert not any(map(is_alive, pids))
    assert {child.name: child.process.returncode for child in children if child.process} == {
        child.name: 0 for child in children
    }


def test_folders_may_have_blanks_in_their_names(tmp_path: Path) -> None:
    model, state = write_tiny_checkpoint(tmp_path / "my model"), tmp_path / "s t"
    with LocalMesh({"MODEL": str(model), "PORT": "0"}, state) as local:
        local.wait_ready(READY_WITHIN_S)
        with mesh_client(local.url) as client:
            assert client.model == "my model"
            assert len(client.ask(Ask("Hello", 4, ignore_eos=True)).token_ids) == 4


def test_no_child_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    model, state = write_tiny_checkpoint(tmp_path / "tiny"), tmp_path / "s"
    command = [sys.executable, "-c", SUPERVISOR, str(model), str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(pid) for pid in supervisor.stdout.readline().split()]
        assert len(pids) == 5
        assert all(map(is_alive, pids))
        supervisor.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, pids)), GONE_WITHIN_S, "the end of all children")


def test_a_signal_ends_the_command_in_order_and_tells_who_is_being_answered(tmp_path: Path) -> None:
    """A plain stream cannot go on without its mesh: its client is told at once."""
    model, state = write_tiny_checkpoint(tmp_path / "tiny"), tmp_path / "s"
    environment = os.environ | {"MODEL": str(model), "STATE_DIR": str(state), "PORT": "0"}
    command = [sys.executable, "-m", "compose.cli", "up"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as up:
        assert up.stdout is not None
        assert up.stderr is not None
        lines = iter(up.stdout.readline, "")
        url = next(line for line in lines if line.startswith("ready ")).split()[1]
        stderr_lines = iter(up.stderr.readline, "")
        assert any("Ctrl-C ends the mesh" in line for line in stderr_lines)
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60, trust_env=False) as reply:
            events = reply.iter_lines()
            assert next(events).startswith("data: ")
            began_s = time.monotonic()
            up.send_signal(signal.SIGTERM)
            rest = [line for line in events if line.startswith("data: ")]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "not_ready"
        assert rest[-1] == "data: [DONE]"
        assert up.wait(GONE_WITHIN_S) == 0
        assert time.monotonic() - began_s < 10
        assert [line.strip() for line in stderr_lines][-1] == "stopping"
    assert "Traceback" not in (state / "logs" / "router-0.log").read_text()
    assert not (state / "http.url").exists()


def test_model_of_an_unsupported_kind_is_refused_by_name(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(MoemeshError, match="llama"), served_mesh(model):
        pass


def test_missing_model_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(MoemeshError, match="no-such-model"), served_mesh(tmp_path / "no-such-model"):
        pass


def test_missing_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    weights = load_file(model / "model.safetensors")
    missing = "model.layers.2.self_attn.k_proj.weight"
    del weights[missing]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoemeshError, match=missing), served_mesh(model, ready_within_s=40):
        pass


def test_tensor_of_another_shape_is_refused_by_its_name(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    weights = load_file(model / "model.safetensors")
    wrong = "model.layers.1.mlp.experts.3.up_proj.weight"
    weights[wrong] = np.zeros((16, 16), np.float32)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoemeshError, match=wrong), served_mesh(model, ready_within_s=40):
        pass


def test_node_with_another_checkpoint_is_refused_and_nobody_else_is_touched(tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=2)
    with served_mesh(write_tiny_checkpoint(tmp_path / "tiny")) as mesh:
        before = mesh.client.ask(Ask("Hello", 8))
        stranger = subprocess.run(
            [sys.executable, "-m", "services.expert"],
            env=os.environ | {"MODEL": str(other), "STATE_DIR": str(mesh.local.state_dir)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert stranger.returncode == 1
        assert "checkpoint" in stranger.stderr.splitlines()[-1]
        assert mesh.client.ask(Ask("Hello", 8)) == before


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("PP", "5", "4 layers"),
        ("PP", "none", "PP"),
        ("TP", "0", "TP"),
        ("DTYPE", "int3", "DTYPE"),
        ("PORT", "70000", "PORT"),
    ],
)
def test_wrong_setting_is_refused_by_its_name(tmp_path: Path, setting: str, value: str, named: str) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    environment = {"MODEL": str(model), "STATE_DIR": str(tmp_path / "s"), "PORT": "0"} | {setting: value}
    refused = subprocess.run(
        [sys.executable, "-m", "services.router"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 1
    assert named in refused.stderr.splitlines()[-1]
