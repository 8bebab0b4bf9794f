"""`docker compose up`, scaled while requests run, and down: the same answers all the way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.compose.compose_mesh import ComposeMesh, compose_mesh
from tests.support.served.mesh_client import Answer, Ask, MeshClient, mesh_client

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

GREEDY = Ask("The router takes each request", max_tokens=24, num_top_logprobs=1, ignore_eos=True)


@pytest.fixture(scope="module")
def mesh() -> Iterator[ComposeMesh]:
    with compose_mesh() as running:
        yield running


@pytest.fixture
def client(mesh: ComposeMesh) -> Iterator[MeshClient]:
    with mesh_client(mesh.url, timeout_s=60) as found:
        yield found


@pytest.fixture(scope="module")
def first_answer(mesh: ComposeMesh) -> Answer:
    """What the mesh says before anything is scaled."""
    with mesh_client(mesh.url, timeout_s=60) as found:
        return found.ask(GREEDY)


@contextmanager
def requests_running(client: MeshClient) -> Iterator[tuple[list[Answer], list[str]]]:
    """Four clients that ask without a pause until the block ends; their answers, and what went wrong."""
    answers: list[Answer] = []
    failures: list[str] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                answers.append(client.ask(GREEDY))
            except httpx.HTTPError as error:
                failures.append(str(error) or repr(error))
                stop.wait(0.1)

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield answers, failures
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=90)
        assert not any(thread.is_alive() for thread in threads), "a request hangs"


def test_the_default_mesh_has_two_of_each(mesh: ComposeMesh) -> None:
    assert {name: mesh.running(name) for name in ("router", "stage", "expert")} == {
        "router": 1,
        "stage": 2,
        "expert": 2,
    }


def test_the_default_model_is_served_under_its_name(client: MeshClient) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["moemesh-demo"]


def test_a_streamed_answer_is_the_same_text(mesh: ComposeMesh, client: MeshClient, first_answer: Answer) -> None:
    body = GREEDY.body(client.model) | {"stream": True}
    pieces: list[str] = []
    with httpx.stream("POST", f"{mesh.url}/v1/completions", json=body, timeout=60, trust_env=False) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        pieces += [choice["text"] for choice in json.loads(event)["choices"]]
    assert "".join(pieces) == first_answer.text


@pytest.mark.parametrize("service", ["router", "stage", "expert"])
def test_no_process_runs_as_root(mesh: ComposeMesh, service: str) -> None:
    assert mesh.compose("exec", "-T", service, "id", "-u").strip() not in ("", "0")


def test_the_router_image_has_no_torch(mesh: ComposeMesh) -> None:
    found = mesh.compose(
        "exec", "-T", "router", "python", "-c", "import importlib.util as u; print(u.find_spec('torch'))"
    )
    assert found.strip() == "None"


def test_workers_find_their_native_kernels_prebuilt(mesh: ComposeMesh) -> None:
    code = "from common.compute.native_library import load_native_kernels as load; print(load().path)"
    assert "/prebuilt/" in mesh.compose("exec", "-T", "expert", "python", "-c", code)


def test_doubling_while_requests_run_fails_none_and_changes_none(
    mesh: ComposeMesh, client: MeshClient, first_answer: Answer
) -> None:
    with requests_running(client) as (answers, failures):
        mesh.scale(stage=4, expert=4)
    assert failures == []
    assert answers
    assert all(answer == first_answer for answer in answers)
    assert client.ask(GREEDY) == first_answer


def test_halving_while_requests_run_hangs_none_and_changes_none(
    mesh: ComposeMesh, client: MeshClient, first_answer: Answer
) -> None:
    started_s = time.time()
    with requests_running(client) as (answers, failures):
        mesh.scale(stage=2, expert=2)
    assert set(mesh.exit_codes_since(started_s).values()) == {0}
    assert answers
    assert all(answer == first_answer for answer in answers)
    assert client.ask(GREEDY) == first_answer
    # Until failover exists a node that goes may fail what it was computing, with a clear error.
    assert all(failure.startswith(("500", "503", "504")) for failure in failures), failures


def test_nodes_told_to_stop_while_they_start_stop(mesh: ComposeMesh, client: MeshClient, first_answer: Answer) -> None:
    started_s = time.time()
    mesh.compose("up", "-d", "--no-build", "--scale", "stage=3", "--scale", "expert=3")
    mesh.scale(stage=2, expert=2)
    # 143: ended by the signal itself, before there was anything to leave. 137 would be one that had to be killed.
    assert set(mesh.exit_codes_since(started_s).values()) <= {0, 143}
    assert client.ask(GREEDY) == first_answer


def test_stopping_ends_every_process_by_itself(mesh: ComposeMesh) -> None:
    started_s = time.time()
    mesh.compose("stop")
    codes = mesh.exit_codes_since(started_s)
    assert len(codes) == 5
    assert set(codes.values()) == {0}


def test_taking_it_down_leaves_nothing_behind(mesh: ComposeMesh) -> None:
    mesh.take_down()
    assert mesh.leftovers() == []
