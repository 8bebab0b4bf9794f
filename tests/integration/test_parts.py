"""Processes that each have a part of the checkpoint and nothing else: one mesh, and the same bits as with the whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import NodeLostError
from compose.shard_checkpoint import shard_checkpoint
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.waiting import wait_until
from tests.support.served.mesh_client import Answer, Ask, mesh_client
from tests.support.served.served_mesh import ServedMesh, served_mesh

READY_AGAIN_WITHIN_S = 90
MISSING_WITHIN_S = 10
SHAPE = {"PP": "2", "EXPERTS": "3", "COPIES": "2"}
ASKS = (
    Ask("A mesh serves one model.", 24, num_top_logprobs=3, ignore_eos=True),
    Ask("Small things joined together", 24, temperature=0.9, seed=7, num_top_logprobs=3, ignore_eos=True),
    Ask(tuple(range(3, 90)), 8, num_top_logprobs=3, ignore_eos=True),
)


@pytest.fixture(scope="module")
def with_the_whole(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    model = write_tiny_checkpoint(tmp_path_factory.mktemp("whole") / "tiny")
    with served_mesh(model, SHAPE) as mesh:
        return mesh.client.ask_all(ASKS)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each on a "host" of its own, and the whole is nowhere any more."""
    directory = tmp_path_factory.mktemp("parts")
    whole = write_tiny_checkpoint(directory / "tiny")
    written = shard_checkpoint(str(whole), directory / "parts", 2, 3, 2)
    hosts: dict[str, Path] = {}
    for part in written:
        hosts[part.name] = tmp_path_factory.mktemp(f"host-of-{part.name}") / "model"
        shutil.copytree(directory / "parts" / part.name, hosts[part.name])
    shutil.rmtree(directory)
    return hosts


@pytest.fixture(scope="module")
def mesh(parts: dict[str, Path]) -> Iterator[ServedMesh]:
    places = {name: {"MODEL": str(path)} for name, path in parts.items() if name != "router"}
    places["stage-spare"] = places["stage-0"]
    with served_mesh(parts["router"], SHAPE, places=places) as served:
        yield served


def answers(mesh: ServedMesh) -> list[Answer]:
    with mesh_client(mesh.local.url) as client:  # a router that comes back has another port
        return client.ask_all(ASKS)


def describe(mesh: ServedMesh) -> dict[str, Any]:
    """What the router says of the mesh; nothing while it is away."""
    try:
        with mesh_client(mesh.local.url) as client:
            described: dict[str, Any] = client.get("/mesh").json()
            return described
    except (NodeLostError, httpx.HTTPError):
        return {"ready": False, "detail": "", "nodes": []}


def is_whole(mesh: ServedMesh) -> bool:
    """Whether every process that runs now has the role for which it has the weights."""
    described = describe(mesh)
    roles = Counter(own["role"] for own in described["nodes"])
    known = {int(own["process"].rpartition("/")[2]) for own in described["nodes"]}
    running = {pid for name, pid in mesh.local.processes() if name != "router-0"}
    return described["ready"] and roles == {"holder": 2, "expert": 3} and known == running


def kill(mesh: ServedMesh, name: str) -> None:
    """And wait for the one that is started in its place."""
    child = mesh.local.children[name]
    assert child.process is not None
    restarts = child.restarts
    child.process.send_signal(signal.SIGKILL)
    wait_until(lambda: child.restarts > restarts, READY_AGAIN_WITHIN_S, f"another {name}")
    wait_until(lambda: is_whole(mesh), READY_AGAIN_WITHIN_S, f"a mesh with another {name}")


def test_tokens_and_logprobs_are_those_of_a_mesh_with_the_whole(mesh: ServedMesh, with_the_whole: list[Answer]) -> None:
    assert mesh.client.model == "tiny", "it has the name of the whole"
    assert answers(mesh) == with_the_whole


def test_each_node_says_what_it_has_and_does_what_it_can(mesh: ServedMesh) -> None:
    wait_until(lambda: is_whole(mesh), READY_AGAIN_WITHIN_S, "all roles")
    nodes = describe(mesh)["nodes"]
    stages = [own for own in nodes if own["kind"] == "stage"]
    layers = {own["slot"]["index"]: own["part"]["layers"] for own in stages}
    assert layers == {0: [0, 2], 1: [2, 4]}
    experts = [own for own in nodes if own["kind"] == "expert"]
    assert sorted(own["shards"] for own in experts) == sorted(4 * len(own["part"]["experts"]) for own in experts)


@pytest.mark.parametrize("name", ["stage-1", "expert-0", "router-0"])
def test_a_process_that_comes_back_with_its_part_is_of_use_again(
    mesh: ServedMesh, name: str, with_the_whole: list[Answer]
) -> None:
    kill(mesh, name)
    assert answers(mesh) == with_the_whole


def test_layers_and_experts_that_no_node_has_any_more_are_named(mesh: ServedMesh, with_the_whole: list[Answer]) -> None:
    mesh.local.add("stage", "stage-spare")
    wait_until(lambda: len(describe(mesh)["nodes"]) == 6, READY_AGAIN_WITHIN_S, "a spare stage")
    stopped = ("stage-1", "expert-0", "expert-1")
    for name in stopped:
        mesh.local.stop(name)
    detail = "no expert node has the weights of experts"
    wait_until(lambda: detail in describe(mesh)["detail"], MISSING_WITHIN_S, "a sentence on experts")
    layers = "no node holds slot 1 of pipeline 0; no node has the weights of layers [2, 4)"
    wait_until(lambda: layers in describe(mesh)["detail"], MISSING_WITHIN_S, "a sentence on layers")
    mesh.local.stop("stage-spare")
    for name in stopped:
        mesh.local.start(name)
    wait_until(lambda: is_whole(mesh), READY_AGAIN_WITHIN_S, "all parts")
    assert answers(mesh) == with_the_whole


def end_of(service: str, model: Path, state_dir: Path) -> str:
    """The sentence with which a process ends that cannot use its MODEL."""
    ended = subprocess.run(
        [sys.executable, "-m", f"services.{service}"],
        env=os.environ | {"MODEL": str(model), "STATE_DIR": str(state_dir), "PORT": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    return ended.stderr.splitlines()[-1]


def test_a_part_of_another_model_is_refused_by_the_router(mesh: ServedMesh, tmp_path: Path) -> None:
    shard_checkpoint(str(write_tiny_checkpoint(tmp_path / "other", seed=2)), tmp_path / "parts", 2, 3, 2)
    assert "the checkpoints differ" in end_of("expert", tmp_path / "parts" / "expert-0", mesh.local.state_dir)


def test_a_part_that_cannot_be_used_is_refused_by_what_is_wrong(parts: dict[str, Path], tmp_path: Path) -> None:
    assert "the part expert-N" in end_of("expert", parts["stage-0"], tmp_path)
    assert "the part router" in end_of("router", parts["expert-0"], tmp_path)
    damaged = Path(shutil.copytree(parts["expert-2"], tmp_path / "expert-2"))
    tensors = load_file(damaged / "model.safetensors")
    lost = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != lost}, damaged / "model.safetensors")
    assert f"tensor {lost} is missing in {damaged}" in end_of("expert", damaged, tmp_path)
