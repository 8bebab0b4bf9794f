"""The router is killed in mid-stream; its clients come back and get exactly the rest."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.errors import NodeLostError
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.process_table import is_alive
from tests.support.processes.waiting import wait_until
from tests.support.served.metrics_text import read_metrics
from tests.support.served.resumable import ResumableStream, RunningResumableStreams
from tests.support.served.served_mesh import ServedMesh, served_mesh

LONG = 300
PENALTIES = {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.5,
    "logit_bias": {str(token_id): -1.0 for token_id in range(20, 40)},
}
"""What the last stage keeps and counts on: it must be told anew, by a new router too."""
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BACK_WITHIN_S = 60
DIFFERING = {"moemesh", "completion_tokens_details"}
"""Parts of usage that tell how an answer came about: after which losses, and by how many drafts."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMesh]:
    model = write_tiny_checkpoint(Path(tmp_path_factory.mktemp("restart")) / "tiny")
    with served_mesh(model, {"PP": "2", "EXPERTS": "1", "COPIES": "1"}) as served:
        yield served


def base(prompt: int, **fields: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": [prompt, 70, 80],
        "max_tokens": LONG,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


def bodies(stop: str) -> dict[str, dict[str, Any]]:
    return {
        "greedy": base(3, temperature=0, logprobs=3),
        "seeded": base(4, temperature=1, seed=11, logprobs=0),
        "two-choices": base(5, temperature=1, seed=12, n=2),
        "penalised": base(7, temperature=1, seed=13, **PENALTIES),
        "stopped": base(6, temperature=0, **({"stop": [stop]} if stop else {})),
    }


def run_streams(mesh: ServedMesh, prefix: str, stop: str) -> list[ResumableStream]:
    streams = [ResumableStream(f"{prefix}-{name}", COMPLETIONS, body) for name, body in bodies(stop).items()]
    with RunningResumableStreams(lambda: mesh.local.url, streams):
        pass
    return streams


def kill_router(mesh: ServedMesh) -> int:
    pid = dict(mesh.local.processes())["router-0"]
    os.kill(pid, signal.SIGKILL)
    return pid


def url(mesh: ServedMesh) -> str:
    return mesh.local.url


def ask_until_there(mesh: ServedMesh, method: str, path: str, **arguments: Any) -> httpx.Response:
    """Asks the router that is there; waits for it to come back."""
    deadline_s = time.monotonic() + BACK_WITHIN_S
    while True:
        try:
            return httpx.request(method, url(mesh) + path, timeout=60, trust_env=False, **arguments)
        except (httpx.HTTPError, NodeLostError):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


@pytest.fixture(scope="module")
def stop_string(mesh: ServedMesh) -> str:
    """What the fourth stream says first after three quarters of its tokens."""
    stream = ResumableStream("probe", COMPLETIONS, bodies("")["stopped"])
    with RunningResumableStreams(lambda: mesh.local.url, [stream]):
        pass
    pieces = [choice["text"] for choice in stream.choices[0]]
    text = "".join(pieces)
    start = len("".join(pieces[: len(pieces) * 3 // 4]))
    length = next(length for length in range(3, 60) if text.find(text[start : start + length]) == start)
    return text[start : start + length]


def test_killed_router_goes_on_with_every_stream_bit_for_bit(mesh: ServedMesh, stop_string: str) -> None:
    undisturbed = run_streams(mesh, "calm", stop_string)
    for stream in undisturbed:
        assert (stream.is_done, stream.errors, stream.num_attachments) == (True, [], 1)
    for round_number in range(2):
        streams = [
            ResumableStream(f"round{round_number}-{name}", COMPLETIONS, body)
            for name, body in bodies(stop_string).items()
        ]
        with RunningResumableStreams(lambda: mesh.local.url, streams) as running:
            wait_until(lambda: all(stream.has_tokens for stream in running.streams), 30, "first tokens", 0.005)
            killed_s = time.monotonic()
            assert not any(stream.is_done for stream in running.streams), "killed in mid-stream"
            kill_router(mesh)
        print(f"all streams ended {time.monotonic() - killed_s:.1f} s after the router's death")
        for stream, expected in zip(streams, undisturbed, strict=True):
            assert stream.errors == []
            assert stream.num_attachments > 1
            assert stream.choices == expected.choices, stream.name
            assert stream.usage is not None
            assert expected.usage is not None
            extension = stream.usage.pop("moemesh")
            assert (extension["recoveries"] >= 1, extension["durable"]) == (True, True)
            assert stream.usage.keys() - DIFFERING == expected.usage.keys() - DIFFERING
            assert all(stream.usage[name] == expected.usage[name] for name in stream.usage.keys() - DIFFERING)
        mesh.local.wait_ready(BACK_WITHIN_S)
    assert [stream.choices[0][-1]["finish_reason"] for stream in undisturbed] == [*["length"] * 4, "stop"]


def test_idempotent_retry_and_polling_find_what_was_under_way(mesh: ServedMesh) -> None:
    mesh.local.wait_ready(BACK_WITHIN_S)
    body = base(8, temperature=1, seed=5, logprobs=1) | {"stream": False, "stream_options": None}
    expected = ask_until_there(mesh, "POST", COMPLETIONS, json=body).json()
    answers: list[httpx.Response] = []
    headers = [
        {"Idempotency-Key": "once", "X-Request-Id": "keyed"},
        {"Moemesh-Resumable": "1", "X-Request-Id": "polled"},
    ]

    def post(own: dict[str, str]) -> None:
        try:
            answers.append(httpx.post(url(mesh) + COMPLETIONS, json=body, headers=own, timeout=60, trust_env=False))
        except httpx.HTTPError:
            return  # the router was killed under it

    threads = [threading.Thread(target=post, args=(own,)) for own in headers]
    for thread in threads:
        thread.start()
    for name in ("keyed", "polled"):
        wait_until(lambda name=name: num_tokens(mesh, name) > 0, 20, "first tokens", 0.01)  # type: ignore[misc]
    old = kill_router(mesh)
    for thread in threads:
        thread.join()
    wait_until(lambda: not is_alive(old), 5, "death of the router")
    assert answers == [], "killed while both were under way"
    retried = ask_until_there(mesh, "POST", COMPLETIONS, json=body, headers=headers[0])
    assert retried.json()["choices"] == expected["choices"]
    changed = ask_until_there(mesh, "POST", COMPLETIONS, json=body | {"seed": 6}, headers=headers[0])
    assert changed.status_code == 422
    wait_until(lambda: state(mesh, "polled")["state"] == "finished", 60, "the polled one")
    polled = state(mesh, "polled")["reply"]
    assert polled["choices"] == expected["choices"]
    assert polled["usage"]["moemesh"]["recoveries"] == 1
    metrics = read_metrics(ask_until_there(mesh, "GET", "/metrics").text)
    assert metrics.value("moemesh_requests_restored_total") == 2
    assert metrics.value("moemesh_journal_writing") == 1
    wait_until(
        lambda: (
            (now := read_metrics(ask_until_there(mesh, "GET", "/metrics").text)).value("moemesh_kv_blocks_free")
            == now.value("moemesh_kv_blocks")
        ),
        5,
        "all blocks free",
    )


def state(mesh: ServedMesh, name: str) -> dict[str, Any]:
    reply: dict[str, Any] = ask_until_there(mesh, "GET", f"/v1/requests/{name}").json()
    return reply


def num_tokens(mesh: ServedMesh, name: str) -> int:
    return sum(choice["num_tokens"] for choice in state(mesh, name).get("choices", ()))


def test_router_that_ends_in_order_sends_resumable_clients_away_and_goes_on_after_its_restart(mesh: ServedMesh) -> None:
    mesh.local.wait_ready(BACK_WITHIN_S)
    body = base(9, temperature=1, seed=3, logprobs=2)
    calm = ResumableStream("calm-stop", COMPLETIONS, body)
    with RunningResumableStreams(lambda: mesh.local.url, [calm]):
        pass
    stream = ResumableStream("stop", COMPLETIONS, body)
    with RunningResumableStreams(lambda: mesh.local.url, [stream]):
        wait_until(lambda: stream.has_tokens, 30, "first tokens", 0.005)
        os.kill(dict(mesh.local.processes())["router-0"], signal.SIGTERM)
    assert (stream.errors, stream.num_attachments > 1) == ([], True)
    assert stream.choices == calm.choices
