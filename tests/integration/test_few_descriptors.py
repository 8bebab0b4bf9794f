"""Processes that may have 128 files and sockets open: clients and newcomers are refused, nothing ends."""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.waiting import wait_until
from tests.support.served.mesh_client import Ask
from tests.support.served.served_mesh import ServedMesh, served_mesh

LIMIT = 128
SHORT = Ask((3, 50, 60), max_tokens=8, ignore_eos=True)
IDLE = b""
HALF_A_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
HALF_A_BODY = HALF_A_HEAD + b"Content-Length: 1000\r\n\r\n{"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMesh]:
    model = write_tiny_checkpoint(Path(tmp_path_factory.mktemp("few")) / "tiny")
    limited = f"tests.support.processes.few_descriptors {LIMIT}"
    modules = {name: f"{limited} services.{name}" for name in ("router", "stage", "expert")}
    with served_mesh(model, {"PP": "2", "EXPERTS": "2", "COPIES": "2"}, modules=modules) as served:
        yield served


def pids(mesh: ServedMesh) -> dict[str, int]:
    return {name: child.process.pid for name, child in mesh.local.children.items() if child.process is not None}


@contextlib.contextmanager
def many_connections(mesh: ServedMesh, number: int, said: bytes) -> Iterator[list[socket.socket]]:
    address = httpx.URL(mesh.client.url)
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(number):
            # The router may have closed one before all of it was said.
            with contextlib.suppress(OSError):
                connection = socket.create_connection((address.host, address.port or 80), timeout=5)
                connections.append(stack.enter_context(connection))
                connection.sendall(said)
        yield connections


@pytest.mark.parametrize("said", [IDLE, HALF_A_HEAD], ids=["silent", "half a head"])
def test_connections_that_ask_nothing_keep_nobody_out(mesh: ServedMesh, said: bytes) -> None:
    before = pids(mesh)
    with many_connections(mesh, 4 * LIMIT, said):
        time.sleep(1)
        began_s = time.monotonic()
        assert len(mesh.client.ask(SHORT).token_ids) == 8
        assert httpx.get(f"{mesh.client.url}/health", timeout=5).status_code == 200
        assert time.monotonic() - began_s < 5
    assert pids(mesh) == before


def test_connections_that_all_have_a_request_are_refused_above_a_bound_and_the_mesh_goes_on(mesh: ServedMesh) -> None:
    before = pids(mesh)
    refusals = []
    with many_connections(mesh, 2 * LIMIT, HALF_A_BODY) as connections:
        time.sleep(1.5)
        for connection in connections:
            connection.settimeout(0.01)
            with contextlib.suppress(OSError):
                refusals.append(connection.recv(4096))
        with many_connections(mesh, 2, HALF_A_BODY):  # in place of what an earlier test has left idle
            assert httpx.get(f"{mesh.client.url}/health", timeout=5).status_code == 503
    told = [refusal for refusal in refusals if refusal.startswith(b"HTTP/1.1 503")]
    assert told
    assert "connections" in json.loads(told[0].partition(b"\r\n\r\n")[2])["error"]["message"]
    wait_until(lambda: mesh.client.get("/health").status_code == 200, 5, "the router serves again")
    assert len(mesh.client.ask(SHORT).token_ids) == 8
    assert pids(mesh) == before


def test_answers_that_nobody_reads_cost_their_own_connections_only(mesh: ServedMesh) -> None:
    before = pids(mesh)
    get = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with many_connections(mesh, 2 * LIMIT, get * 200):
        time.sleep(2)
    wait_until(lambda: mesh.client.get("/health").status_code == 200, 5, "the router serves again")
    assert len(mesh.client.ask(SHORT).token_ids) == 8
    assert pids(mesh) == before


def leave_free(pid: int, number: int) -> None:
    """So many files more, and no further one, may this process open."""
    occupied = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    free = itertools.islice((descriptor for descriptor in itertools.count() if descriptor not in occupied), number + 1)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (list(free)[-1], LIMIT))


@pytest.mark.parametrize("service", ["router", "stage"])
def test_a_node_for_which_there_is_no_socket_is_refused_and_costs_nobody_anything(
    mesh: ServedMesh, service: str
) -> None:
    """An expert node dies; before it comes back the others are left with two descriptors, and a link takes four."""
    before = pids(mesh)
    limited = [pid for name, pid in before.items() if name.startswith(service)]
    logs = [mesh.local.logs(name) for name in before if name.startswith(service)]
    expert = next(name for name in before if name.startswith("expert"))
    others = {name: pid for name, pid in before.items() if name != expert}
    assert len(mesh.client.ask(SHORT).token_ids) == 8  # the connection for the rest is there
    process = mesh.local.children[expert].process
    assert process is not None
    process.kill()
    try:
        wait_until(lambda: len(mesh.client.get("/mesh").json()["nodes"]) == 3, 5, "its end is known")
        time.sleep(0.2)
        for pid in limited:
            leave_free(pid, 2)
        said = "no socket can be opened"
        wait_until(lambda: any(said in path.read_text() for path in logs), 30, "want of sockets is said")
        assert len(mesh.client.ask(SHORT).token_ids) == 8
    finally:
        for pid in limited:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
    wait_until(lambda: len(mesh.client.get("/mesh").json()["nodes"]) == 4, 60, "the node is back")
    wait_until(lambda: mesh.client.get("/ready").status_code == 200, 60, "the mesh is whole again")
    assert {name: pid for name, pid in pids(mesh).items() if name != expert} == others
    assert len(mesh.client.ask(SHORT).token_ids) == 8
