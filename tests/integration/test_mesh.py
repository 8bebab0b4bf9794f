"""Real processes that come, go and die, while somebody asks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.process_table import is_alive
from tests.support.processes.waiting import wait_until
from tests.support.served.mesh_client import Answer, Ask, mesh_client
from tests.support.served.metrics_text import MetricsSnapshot, read_metrics
from tests.support.served.rude_clients import Vanishing, vanish
from tests.support.served.served_mesh import ServedMesh, served_mesh
from tests.support.served.streams import RunningStreams, Stream

MAX_SILENCE_S = 10
READY_AGAIN_WITHIN_S = 90
LONG = 300
"""Tokens of an answer that is still under way when something dies."""


def short_asks() -> list[Ask]:
    return [Ask((3 + number, 50, 60), max_tokens=12, ignore_eos=True) for number in range(4)]


def long_asks() -> list[Ask]:
    return [Ask((3 + number, 70, 80), max_tokens=LONG, ignore_eos=True) for number in range(6)]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMesh]:
    model = write_tiny_checkpoint(Path(tmp_path_factory.mktemp("mesh")) / "tiny")
    with served_mesh(model, {"PP": "2", "EXPERTS": "2", "COPIES": "2"}) as served:
        yield served


@pytest.fixture(scope="module")
def undisturbed(mesh: ServedMesh) -> dict[Ask, Answer]:
    """What the mesh says when nothing happens."""
    asks = short_asks() + long_asks()
    return dict(zip(asks, mesh.client.ask_all(asks), strict=True))


def metrics(mesh: ServedMesh) -> MetricsSnapshot:
    return read_metrics(mesh.client.get("/metrics").text)


def holds_no_block(mesh: ServedMesh) -> bool:
    now = metrics(mesh)
    return now.value("moemesh_kv_blocks_free") == now.value("moemesh_kv_blocks")


def is_ready(mesh: ServedMesh) -> bool:
    return mesh.client.get("/ready").status_code == 200


def assert_answers_as_before(mesh: ServedMesh, undisturbed: dict[Ask, Answer]) -> None:
    for ask in short_asks():
        assert mesh.client.ask(ask) == undisturbed[ask]


def assert_went_on_or_said_why(stream: Stream, died_s: float, undisturbed: dict[Ask, Answer]) -> None:
    assert stream.broke_off == "", stream
    expected = undisturbed[stream.ask].token_ids
    if stream.error is None:
        assert tuple(stream.token_ids) == expected
        assert stream.finish_reason == "length"
    else:
        assert tuple(stream.token_ids) == expected[: len(stream.token_ids)]
        assert stream.error["message"]
        assert stream.error["type"] == "server_error"
    assert stream.longest_silence_s(died_s) < MAX_SILENCE_S


def test_health_readiness_and_models_tell_what_is_there(mesh: ServedMesh) -> None:
    assert mesh.client.get("/health").status_code == 200
    assert is_ready(mesh)
    assert [model["id"] for model in mesh.client.get("/v1/models").json()["data"]] == ["tiny"]
    # A mesh is ready before its last expert node is, if the others hold all experts.
    nodes = {"stage": 2, "expert": 2}
    wait_until(lambda: metrics(mesh).by_label("moemesh_nodes", "kind") == nodes, 30, "both nodes of each kind")
    assert metrics(mesh).value("moemesh_pipelines_open") == 1


def test_streamed_and_whole_answers_are_the_same(mesh: ServedMesh, undisturbed: dict[Ask, Answer]) -> None:
    with RunningStreams(mesh.local.url, mesh.client.model, short_asks()) as running:
        pass
    for stream in running.streams:
        assert tuple(stream.token_ids) == undisturbed[stream.ask].token_ids


def test_a_lone_stream_is_planned_ahead_and_costs_no_generation_of_the_pipeline(mesh: ServedMesh) -> None:
    """A step that waits for tokens which do not come is done again in a new generation: right, but a second late."""
    before = metrics(mesh)
    mesh.client.ask(Ask((3, 90), max_tokens=LONG, ignore_eos=True))
    name = "moemesh_steps_planned_ahead_total"
    wait_until(lambda: metrics(mesh).value(name) - before.value(name) > LONG - 10, 10, "steps planned ahead")
    generation = "moemesh_pipeline_generation"
    assert metrics(mesh).value(generation) == before.value(generation)


def test_client_that_vanishes_frees_what_it_held(mesh: ServedMesh) -> None:
    vanish(mesh.local.url, mesh.client.model, Ask((9, 9, 9), 3000, ignore_eos=True), Vanishing.IN_THE_STREAM)
    wait_until(lambda: metrics(mesh).value("moemesh_requests_running") == 0, 5, "the request of a vanished client")
    wait_until(lambda: holds_no_block(mesh), 2, "all blocks free")


def test_nodes_join_and_leave_while_requests_run(mesh: ServedMesh, undisturbed: dict[Ask, Answer]) -> None:
    finished = threading.Event()
    wrong: list[str] = []

    def keep_asking() -> None:
        while not finished.is_set():
            for ask in short_asks():
                try:
                    if mesh.client.ask(ask) != undisturbed[ask]:
                        wrong.append(f"another answer to {ask}")
                except httpx.HTTPError as error:
                    wrong.append(str(error))

    asker = threading.Thread(target=keep_asking)
    asker.start()
    try:
        version = metrics(mesh).value("moemesh_placement_version")
        mesh.local.add("expert", "expert-new")
        wait_until(
            lambda: (
                metrics(mesh).by_label("moemesh_nodes", "kind")["expert"] == 3
                and metrics(mesh).value("moemesh_placement_version") > version
            ),
            READY_AGAIN_WITHIN_S,
            "a third expert node with shards",
        )
        for number in range(2):
            mesh.local.add("stage", f"stage-new-{number}")
        wait_until(
            lambda: metrics(mesh).value("moemesh_pipelines_open") == 2, READY_AGAIN_WITHIN_S, "a second pipeline"
        )
        wait_until(lambda: serves_both_pipelines(mesh), READY_AGAIN_WITHIN_S, "work for the new stages")
        for name in ("expert-new", "stage-new-0", "stage-new-1"):
            process = mesh.local.children[name].process
            mesh.local.stop(name)
            assert process is not None
            assert process.returncode == 0, f"{name} left with {process.returncode}"
        wait_until(
            lambda: metrics(mesh).by_label("moemesh_nodes", "kind") == {"stage": 2, "expert": 2}, 10, "two of each kind"
        )
        assert is_ready(mesh)
    finally:
        finished.set()
        asker.join()
    assert wrong == []
    assert_answers_as_before(mesh, undisturbed)


def serves_both_pipelines(mesh: ServedMesh) -> bool:
    rows = metrics(mesh).samples
    return sum(1 for (name, labels), value in rows.items() if is_busy_stage(name, dict(labels), value)) == 4


def is_busy_stage(name: str, labels: dict[str, str], value: float) -> bool:
    return name == "moemesh_node_rows_total" and labels["kind"] == "stage" and value > 0


@pytest.mark.parametrize("victim", ["expert-0", "stage-0", "stage-1"])
def test_killed_node_ends_no_request_in_silence_and_is_replaced(
    mesh: ServedMesh, undisturbed: dict[Ask, Answer], victim: str
) -> None:
    pid = dict(mesh.local.processes())[victim]
    with RunningStreams(mesh.local.url, mesh.client.model, long_asks()) as running:
        wait_until(lambda: running.all_have_tokens, 30, "first tokens")
        died_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
    for stream in running.streams:
        assert_went_on_or_said_why(stream, died_s, undisturbed)
    num_failed = sum(stream.error is not None for stream in running.streams)
    silence_s = max(stream.longest_silence_s(died_s) for stream in running.streams)
    print(f"{victim} killed: {num_failed} of {len(running.streams)} requests failed; silence up to {silence_s:.1f} s")
    wait_until(
        lambda: metrics(mesh).by_label("moemesh_nodes", "kind") == {"stage": 2, "expert": 2} and is_ready(mesh),
        READY_AGAIN_WITHIN_S,
        f"the mesh after the death of {victim}",
        interval_s=0.2,
    )
    assert dict(mesh.local.processes())[victim] != pid
    assert_answers_as_before(mesh, undisturbed)
    wait_until(lambda: holds_no_block(mesh), 2, "all blocks free")


def test_readiness_turns_false_when_the_only_pipeline_breaks(mesh: ServedMesh) -> None:
    os.kill(dict(mesh.local.processes())["stage-1"], signal.SIGKILL)
    took_s = wait_until(lambda: not is_ready(mesh), 5, "not ready after a crash", interval_s=0.02)
    print(f"not ready {took_s:.2f} s after the crash")
    wait_until(lambda: is_ready(mesh), READY_AGAIN_WITHIN_S, "ready again", interval_s=0.2)


def test_killed_router_comes_back_and_finds_its_nodes(mesh: ServedMesh, undisturbed: dict[Ask, Answer]) -> None:
    processes = dict(mesh.local.processes())
    os.kill(processes["router-0"], signal.SIGKILL)
    wait_until(lambda: not is_alive(processes["router-0"]), 5, "death of the router")
    mesh.local.wait_ready(READY_AGAIN_WITHIN_S)
    # Another port, unless the settings name one.
    with mesh_client(mesh.local.url) as client:
        ask = short_asks()[0]
        assert client.ask(ask) == undisturbed[ask]
