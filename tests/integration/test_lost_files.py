"""Somebody clears the state folder of a mesh that runs: the next death must cost what it always costs."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.integration.test_stage_faults import holder_of, wait_for_mirrors
from tests.support.processes.waiting import wait_until
from tests.support.served.fault_runs import pid_of
from tests.support.served.mesh_client import Ask, mesh_client
from tests.support.served.served_mesh import ServedMesh, served_mesh

WITHIN_S = 60


def remove_sockets(state: Path) -> None:
    for path in (state / "ipc").iterdir():
        path.unlink()


def remove_folder(state: Path) -> None:
    shutil.rmtree(state)


def kill(mesh: ServedMesh, name: str) -> None:
    before = pid_of(mesh, name)
    os.kill(before, signal.SIGKILL)

    def is_back() -> bool:
        return dict(mesh.local.processes()).get(name, before) != before

    wait_until(is_back, WITHIN_S, f"another {name}")


@pytest.mark.parametrize("remove", [remove_sockets, remove_folder])
def test_a_mesh_whose_files_were_removed_takes_in_who_comes_later(
    remove: Callable[[Path], None], tmp_path: Path
) -> None:
    settings = {"PP": "2", "SPARES": "2", "EXPERTS": "3", "JOURNAL": "off"}
    with served_mesh(write_tiny_checkpoint(tmp_path / "tiny"), settings) as mesh:
        wait_for_mirrors(mesh)
        asked = Ask("Hello", 8, ignore_eos=True)
        before = mesh.client.ask(asked)
        holder = holder_of(mesh, 0)
        remove(mesh.local.state_dir)
        time.sleep(1.5)
        assert (mesh.local.state_dir / "ipc" / "control").is_socket()
        assert (mesh.local.state_dir / "http.url").read_text().strip() == mesh.local.url
        for name in (holder, "expert-0"):
            kill(mesh, name)
            assert mesh.client.ask(asked) == before
        wait_for_mirrors(mesh)  # the restarted stage was taken in, and connected to
        kill(mesh, "router-0")
        mesh.local.wait_ready(WITHIN_S)
        with mesh_client(mesh.local.url) as client:  # at another port
            assert client.ask(asked) == before
