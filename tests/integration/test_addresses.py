"""Meshes over TCP: what addresses they may have, and what they say of one that leads nowhere."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import httpx
import pytest

from common.processes.supervisor import LocalMesh
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.waiting import wait_until
from tests.support.served.mesh_client import Ask, mesh_client
from tests.support.served.served_mesh import READY_WITHIN_S, served_mesh


def free_port(family: socket.AddressFamily, host: str) -> int:
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def has_ipv6() -> bool:
    try:
        free_port(socket.AF_INET6, "::1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_mesh_may_speak_ipv6_between_its_processes(tmp_path: Path) -> None:
    control = f"tcp://[::1]:{free_port(socket.AF_INET6, '::1')}"
    with served_mesh(write_tiny_checkpoint(tmp_path / "tiny"), {"CONTROL": control, "HOST": "::1"}) as mesh:
        assert mesh.local.url.startswith("http://[::1]:")
        assert len(mesh.client.ask(Ask("Hello", 8, ignore_eos=True)).token_ids) == 8


def test_over_tcp_expert_calls_go_over_links_and_tokens_are_the_same(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    control = f"tcp://127.0.0.1:{free_port(socket.AF_INET, '127.0.0.1')}"
    said, events = [], []
    for settings in ({}, {"CONTROL": control}, {"CONTROL": control, "CALL_RINGS": "off"}):
        with served_mesh(model, {"PP": "1", **settings}) as mesh:
            mesh.client.ask(Ask("Hello", 8, ignore_eos=True))
            said.append(mesh.client.ask(Ask("Hello", 40, ignore_eos=True)).token_ids)
            log = mesh.local.logs("stage-0").read_text()
            events.append({event for event in ("ring_open", "link_open") if f'"{event}"' in log})
    assert said[0] == said[1] == said[2]
    assert events == [{"ring_open"}, {"link_open"}, set()]


def test_a_mesh_whose_results_lead_nowhere_is_never_ready(tmp_path: Path) -> None:
    control = f"tcp://127.0.0.1:{free_port(socket.AF_INET, '127.0.0.1')}"
    environment = {"MODEL": str(write_tiny_checkpoint(tmp_path / "tiny")), "PORT": "0", "CONTROL": control}
    lost = {"ADVERTISE_HOST": "no-such-host.invalid"}
    with LocalMesh(environment, tmp_path / "s", places={"router-0": lost}) as mesh:
        wait_until(lambda: "pipeline_open" in mesh.logs("router-0").read_text(), READY_WITHIN_S, "a pipeline")
        until_s = time.monotonic() + 4
        while time.monotonic() < until_s:
            assert httpx.get(f"{mesh.url}/ready", trust_env=False).status_code == 503
            time.sleep(0.05)


def test_a_mesh_is_not_ready_before_the_links_to_its_nodes_stand(tmp_path: Path) -> None:
    """A name that leads nowhere is told, nobody counts on the node, and the mesh says what is missing all the time."""
    control = f"tcp://127.0.0.1:{free_port(socket.AF_INET, '127.0.0.1')}"
    environment = {"MODEL": str(write_tiny_checkpoint(tmp_path / "tiny")), "PORT": "0", "CONTROL": control}
    lost = {"ADVERTISE_HOST": "no-such-host.invalid"}
    with LocalMesh(environment, tmp_path / "s", places={"stage-1": lost}) as mesh:
        wait_until(lambda: (tmp_path / "s" / "http.url").exists(), READY_WITHIN_S, "the router")
        wait_until(lambda: "node_joined" in mesh.logs("router-0").read_text(), READY_WITHIN_S, "nodes")
        until_s = time.monotonic() + 13
        while time.monotonic() < until_s:
            assert httpx.get(f"{mesh.url}/ready", trust_env=False).status_code == 503
            time.sleep(0.1)
        said = mesh.logs("stage-1").read_text()
        assert "the router cannot connect to stage-" in said
        assert "ADVERTISE_HOST must be" in said
        mesh.scale("stage", 3)  # one that can be reached
        mesh.wait_ready(READY_WITHIN_S)
        with mesh_client(mesh.url) as client:
            assert len(client.ask(Ask("Hello", 8, ignore_eos=True)).token_ids) == 8
