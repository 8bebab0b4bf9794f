"""Expert nodes are paused, killed and told to stop under load, with a copy of everything: nobody notices but the clock.

Eight streams, greedy and sampled. Their tokens and log-probabilities are those of the run without a fault, bit by bit.
The longest time without a token is printed (`-s` shows it); how short it must be is for the chaos suites to judge:
it says as much about the machine that runs the test.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from chaos.targets.local_target import free_port
from compose.tiny_checkpoint import TINY, write_tiny_checkpoint
from tests.support.processes.process_table import is_alive
from tests.support.processes.waiting import wait_until
from tests.support.served.fault_runs import asks, metric, pid_of, run_through
from tests.support.served.mesh_client import Answer
from tests.support.served.metrics_text import read_metrics
from tests.support.served.served_mesh import ServedMesh, served_mesh
from tests.support.served.streams import RunningStreams

PAUSE_S = 3.0
MAX_GAP_S = 5.0
"""Far above what is promised: a machine that is busy with something else must not fail the test."""
READY_AGAIN_WITHIN_S = 90
HEARTBEAT_WITHIN_S = 10
"""What nodes count is known with their next heartbeat."""


run_fault = partial(run_through, max_gap_s=MAX_GAP_S)


@pytest.fixture(scope="module", params=["through rings", pytest.param("over links", marks=pytest.mark.slow)])
def mesh(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[ServedMesh]:
    """`request.param`: how calls go."""
    model = write_tiny_checkpoint(Path(tmp_path_factory.mktemp("faults")) / "tiny")
    over_tcp = {"CONTROL": f"tcp://127.0.0.1:{free_port()}"} if request.param == "over links" else {}
    with served_mesh(model, {"PP": "2", "EXPERTS": "2", "COPIES": "2", **over_tcp}) as served:
        yield served


@pytest.fixture(scope="module")
def undisturbed(mesh: ServedMesh) -> list[Answer]:
    return mesh.client.ask_all(asks())


@pytest.fixture
def well(mesh: ServedMesh) -> ServedMesh:
    """The mesh. Every test begins with both expert nodes in place and every copy there."""
    wait_until(lambda: metric(mesh, "moemesh_missing_copies") == 0, READY_AGAIN_WITHIN_S, "all copies")
    wait_until(
        lambda: read_metrics(mesh.client.get("/metrics").text).by_label("moemesh_nodes", "kind")["expert"] == 2,
        READY_AGAIN_WITHIN_S,
        "two expert nodes",
    )
    settle(mesh)
    return mesh


def settle(mesh: ServedMesh) -> None:
    """The placement has not changed for a second: what had to be loaded is loaded."""
    version, since_s = metric(mesh, "moemesh_placement_version"), time.monotonic()
    while time.monotonic() - since_s < 1.0:
        time.sleep(0.1)
        if (now := metric(mesh, "moemesh_placement_version")) != version:
            version, since_s = now, time.monotonic()


@pytest.mark.slow
def test_without_a_fault_streams_say_what_whole_answers_say(well: ServedMesh, undisturbed: list[Answer]) -> None:
    run_fault(well, undisturbed, "no fault", lambda: None)


@pytest.mark.parametrize("name", ["expert-0", pytest.param("expert-1", marks=pytest.mark.slow)])
def test_a_paused_expert_node_costs_nothing_but_a_moment(
    well: ServedMesh, undisturbed: list[Answer], name: str
) -> None:
    pid = pid_of(well, name)
    wake = threading.Timer(PAUSE_S, os.kill, (pid, signal.SIGCONT))

    def pause() -> None:
        os.kill(pid, signal.SIGSTOP)
        wake.start()

    try:
        run_fault(well, undisturbed, f"{name} paused", pause)
    finally:
        wake.join()
    wait_until(lambda: metric(well, "moemesh_expert_hedges_total") > 0, HEARTBEAT_WITHIN_S, "calls asked of the copy")
    log = well.local.logs(name)
    wait_until(lambda: '"node_rejoining"' in log.read_text(), 20, "the node to hear that it was taken for dead")
    settle(well)
    assert pid_of(well, name) == pid, "the process need not end for that"
    lines = [json.loads(line) for line in log.read_text().splitlines() if line[:1] == "{"]
    life = max(number for number, line in enumerate(lines) if line["event"] == "node_rejoining")
    assigned = [line for line in lines[life:] if line["event"] == "shards_assigned"]
    assert assigned, "it serves again"
    assert assigned[-1]["missing"] == 0, "nor read its shards again"


@pytest.mark.slow
def test_a_short_pause_is_hedged_and_nobody_is_declared_dead(well: ServedMesh, undisturbed: list[Answer]) -> None:
    pid = pid_of(well, "expert-0")

    def pause() -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.35)
        os.kill(pid, signal.SIGCONT)

    run_fault(well, undisturbed, "expert-0 paused for 0.35 s", pause)
    assert is_alive(pid)


def test_a_killed_expert_node_costs_nothing_but_a_moment(well: ServedMesh, undisturbed: list[Answer]) -> None:
    run_fault(well, undisturbed, "expert-0 killed", lambda: os.kill(pid_of(well, "expert-0"), signal.SIGKILL))


def test_an_expert_node_that_is_told_to_stop_hands_over_and_leaves_with_status_0(
    well: ServedMesh, undisturbed: list[Answer]
) -> None:
    process = well.local.children["expert-1"].process
    assert process is not None
    run_fault(well, undisturbed, "expert-1 told to stop", lambda: os.kill(process.pid, signal.SIGTERM))
    wait_until(lambda: process.poll() is not None, 20, "the end of the process")
    assert process.returncode == 0


def test_shards_that_only_a_killed_node_held_are_loaded_elsewhere_while_the_step_waits(
    tmp_path: Path,
) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    with served_mesh(model, {"PP": "2", "EXPERTS": "2", "COPIES": "1"}) as alone:
        expected = alone.client.ask_all(asks())
        run_fault(alone, expected, "only holder killed", lambda: os.kill(pid_of(alone, "expert-0"), signal.SIGKILL))
        assert metric(alone, "moemesh_failed_steps_total") == 0, "inside the step"


def test_where_nobody_can_load_them_tokens_go_on_without_if_the_operator_wants_that(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    shard_bytes = 3 * TINY.width * TINY.expert_width * 4
    num_shards = TINY.layers * TINY.experts
    settings = {
        "PP": "2",
        "EXPERTS": "2",
        "COPIES": "1",
        "EXPERT_LOSS": "degrade",
        "DEGRADE_AFTER_MS": "200",
        "CAPACITY_BYTES": str(shard_bytes * num_shards * 5 // 8),
    }
    with served_mesh(model, settings) as narrow:
        asked = [replace(ask, max_tokens=80) for ask in asks()]
        expected = narrow.client.ask_all(asked)
        with RunningStreams(narrow.local.url, narrow.client.model, asked) as running:
            wait_until(lambda: all(len(stream.token_ids) > 20 for stream in running.streams), 60, "tokens")
            os.kill(pid_of(narrow, "expert-0"), signal.SIGKILL)
        for stream in running.streams:
            assert (stream.broke_off, stream.error, stream.finish_reason) == ("", None, "length")
        wait_until(lambda: metric(narrow, "moemesh_degraded_rows_total") > 0, HEARTBEAT_WITHIN_S, "rows without experts")
        wait_until(lambda: narrow.client.get("/ready").status_code == 200, READY_AGAIN_WITHIN_S, "all shards")
        assert narrow.client.ask_all(asked) == expected, "whole again"
