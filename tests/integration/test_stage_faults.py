"""Stages are killed, paused and told to stop under load: by mirror and by replay, no token is lost or changed."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.waiting import wait_until
from tests.support.served.fault_runs import asks, metric, pid_of, run_through
from tests.support.served.mesh_client import Answer
from tests.support.served.served_mesh import ServedMesh, served_mesh

MAX_GAP_S = 20.0
"""A mirror takes far less, a process start on a busy machine not much: the chaos suites measure."""
READY_AGAIN_WITHIN_S = 90
PAUSE_S = 3.0
ROLE_EVENTS = frozenset({"slot_taken", "mirror_begins", "loading_layers", "node_rejoining"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(Path(tmp_path_factory.mktemp("stages")) / "tiny")


@pytest.fixture(scope="module")
def mirrored(model: Path) -> Iterator[ServedMesh]:
    with served_mesh(model, {"PP": "2", "SPARES": "2", "EXPERTS": "2", "COPIES": "2"}) as served:
        yield served


@pytest.fixture(scope="module")
def undisturbed(mirrored: ServedMesh) -> list[Answer]:
    return mirrored.client.ask_all(asks())


def holder_of(mesh: ServedMesh, slot: int) -> str:
    """The process that holds a slot now; where it may change hands, ask `find_holder`."""
    name = find_holder(mesh, slot)
    assert name is not None, f"nobody holds slot {slot}"
    return name


def find_holder(mesh: ServedMesh, slot: int) -> str | None:
    """The process that holds a slot now, by its own log; None while nobody does."""
    for name in mesh.local.children:
        if name.startswith("stage"):
            lines = [json.loads(line) for line in mesh.local.logs(name).read_text().splitlines() if line[:1] == "{"]
            roles = [line for line in lines if line["event"] in ROLE_EVENTS]
            if roles and roles[-1]["event"] == "slot_taken" and roles[-1]["slot"] == slot:
                return name
    return None


def wait_for_mirrors(mesh: ServedMesh) -> None:
    wait_until(lambda: metric(mesh, "moemesh_mirrors_complete") == 2, READY_AGAIN_WITHIN_S, "both mirrors")


@pytest.mark.parametrize("slot", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_stage_is_taken_over_by_its_mirror_without_a_prefill(
    mirrored: ServedMesh, undisturbed: list[Answer], slot: int
) -> None:
    wait_for_mirrors(mirrored)
    before = metric(mirrored, "moemesh_tokens_replayed_total")
    name = holder_of(mirrored, slot)
    run_through(
        mirrored,
        undisturbed,
        f"slot {slot} killed, mirrored",
        lambda: os.kill(pid_of(mirrored, name), signal.SIGKILL),
        MAX_GAP_S,
    )
    # Sixteen sequences of a few hundred positions each: a mirror lags by a few steps at most.
    assert metric(mirrored, "moemesh_tokens_replayed_total") - before < 16 * 40
    assert metric(mirrored, "moemesh_tokens_recomputed_total") == 0


def test_a_paused_stage_is_taken_over_and_fenced_when_it_wakes_up(
    mirrored: ServedMesh, undisturbed: list[Answer]
) -> None:
    wait_for_mirrors(mirrored)
    name = holder_of(mirrored, 1)
    pid = pid_of(mirrored, name)
    wake = threading.Timer(PAUSE_S, os.kill, (pid, signal.SIGCONT))

    def pause() -> None:
        os.kill(pid, signal.SIGSTOP)
        wake.start()

    try:
        run_through(mirrored, undisturbed, "slot 1 paused, mirrored", pause, MAX_GAP_S)
    finally:
        wake.join()
    log = mirrored.local.logs(name)
    wait_until(lambda: '"node_rejoining"' in log.read_text(), 20, "the old holder to hear that it was replaced")
    wait_for_mirrors(mirrored)
    assert pid_of(mirrored, name) == pid, "the process need not end for that"


def test_a_stage_that_is_told_to_stop_hands_over_and_leaves_with_status_0(
    mirrored: ServedMesh, undisturbed: list[Answer]
) -> None:
    wait_for_mirrors(mirrored)
    process = mirrored.local.children[holder_of(mirrored, 0)].process
    assert process is not None
    run_through(
        mirrored,
        undisturbed,
        "slot 0 told to stop",
        lambda: os.kill(process.pid, signal.SIGTERM),
        MAX_GAP_S,
    )
    wait_until(lambda: process.poll() is not None, 20, "the end of the process")
    assert process.returncode == 0
    assert metric(mirrored, "moemesh_tokens_recomputed_total") == 0


@pytest.mark.parametrize("slot", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_without_a_mirror_the_restarted_process_gets_its_cache_by_replay(
    model: Path, undisturbed: list[Answer], slot: int
) -> None:
    with served_mesh(model, {"PP": "2", "SPARES": "0", "EXPERTS": "2", "COPIES": "2"}) as bare:
        name = holder_of(bare, slot)
        run_through(
            bare,
            undisturbed,
            f"slot {slot} killed, replay",
            lambda: os.kill(pid_of(bare, name), signal.SIGKILL),
            MAX_GAP_S * 2,
        )
        assert metric(bare, "moemesh_tokens_replayed_total") > 0
        assert metric(bare, "moemesh_tokens_recomputed_total") == 0, "the other stage kept its cache"
