"""A request over which the router dies: others are answered, and its client is told in the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.errors import NodeLostError
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.served.served_mesh import ServedMesh, served_mesh

IN_THE_MESH, IN_THE_FRONT = 77, 78
WITHIN_S = 90


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMesh]:
    model = write_tiny_checkpoint(Path(tmp_path_factory.mktemp("culprit")) / "tiny")
    modules = {"router": f"tests.support.processes.dying_router {IN_THE_MESH} {IN_THE_FRONT}"}
    with served_mesh(model, {"PP": "1", "EXPERTS": "1", "COPIES": "1"}, modules=modules) as served:
        yield served


def ask(mesh: ServedMesh, method: str, path: str, **arguments: object) -> httpx.Response | None:
    """None while no router answers."""
    try:
        return httpx.request(method, mesh.local.url + path, timeout=20, trust_env=False, **arguments)  # type: ignore[arg-type]
    except (httpx.HTTPError, NodeLostError):
        return None


@pytest.mark.parametrize("culprit", [IN_THE_MESH, IN_THE_FRONT])
def test_a_request_that_kills_router_after_router_is_set_aside_and_the_others_go_on(
    mesh: ServedMesh, culprit: int
) -> None:
    """In the front it is not the first end that counts, over a new token, but those over tokens of the journal."""
    before = dict(mesh.local.processes())["router-0"]
    body = {"model": "tiny", "prompt": [culprit, 5], "max_tokens": 5, "ignore_eos": True}
    headers = {"Moemesh-Resumable": "1", "X-Request-Id": f"mine-{culprit}"}
    assert ask(mesh, "POST", "/v1/completions", json=body, headers=headers) is None
    until_s = time.monotonic() + WITHIN_S
    told = None
    while told is None or told.status_code != 500:
        assert time.monotonic() < until_s, told and told.text
        told = ask(mesh, "GET", f"/v1/requests/mine-{culprit}")
        time.sleep(0.1)
    assert told.json()["error"]["code"] == "request_set_aside"
    assert "3 times in a row" in told.json()["error"]["message"]
    while (ready := ask(mesh, "GET", "/ready")) is None or ready.status_code != 200:
        assert time.monotonic() < until_s, ready and ready.text
        time.sleep(0.1)
    assert dict(mesh.local.processes())["router-0"] != before
    answer = ask(mesh, "POST", "/v1/completions", json=body | {"prompt": [5, 6]})
    assert answer is not None
    assert answer.json()["usage"]["completion_tokens"] == 5
