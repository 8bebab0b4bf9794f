"""/ready tells the truth of real processes that die, hang and come back. Prints what it measures; asserts with room."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.waiting import wait_until
from tests.support.served.mesh_client import Ask
from tests.support.served.readiness_watch import ReadinessWatch
from tests.support.served.served_mesh import ServedMesh, served_mesh
from tests.support.served.streams import RunningStreams

CRASH_SEEN_WITHIN_S = 2.0
HANG_SEEN_WITHIN_S = 4.0
"""The bounds that are promised are 1 s and 2 s; a test machine may be busy with other things."""
READY_AGAIN_WITHIN_S = 90
RESTART_DELAY_S = 3.0


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMesh]:
    model = write_tiny_checkpoint(Path(tmp_path_factory.mktemp("readiness")) / "tiny")
    settings = {"PP": "1", "STAGES": "1", "EXPERTS": "2", "COPIES": "2", "STEP_DEADLINE_MS": "20000"}
    with served_mesh(model, settings) as served:
        yield served


@pytest.fixture
def watch(mesh: ServedMesh) -> Iterator[ReadinessWatch]:
    wait_until(lambda: mesh.client.get("/ready").status_code == 200, READY_AGAIN_WITHIN_S, "a mesh that is ready")
    with ReadinessWatch(mesh.local.url) as watching:
        wait_until(lambda: bool(watching.turns), 5, "a first answer")
        yield watching


def pids(mesh: ServedMesh, *names: str) -> list[int]:
    running = dict(mesh.local.processes())
    return [running[name] for name in names]


@contextmanager
def restarts_delayed(mesh: ServedMesh, names: Sequence[str]) -> Iterator[None]:
    """The supervisor leaves these alone, so that the time in which they are gone is the test's to choose."""
    children = [mesh.local.children[name] for name in names]
    for child in children:
        child.is_wanted = False
    try:
        yield
    finally:
        for child in children:
            child.is_wanted = True


def fault(
    mesh: ServedMesh, watch: ReadinessWatch, number: signal.Signals, names: Sequence[str], within_s: float
) -> float:
    """Sends the signal; how long /ready went on saying yes."""
    targets = pids(mesh, *names)
    at_s = time.monotonic()
    for pid in targets:
        os.kill(pid, number)
    seen_s = watch.seconds_until(False, at_s, within_s, time.monotonic)
    said = next(turn.said for turn in watch.turns if turn.at_s >= at_s and not turn.ready)
    print(f"\n{number.name} of {', '.join(names)}: /ready false after {seen_s:.3f} s: {said}")
    return seen_s


def last_part_came_s(mesh: ServedMesh, names: Sequence[str]) -> float:
    """By the monotonic clock: when the pipeline opened, or the nodes had their shards, as the logs have it."""
    log, event = ("router-0", "pipeline_open") if names == ("stage-0",) else (names[0], "shards_ready")
    lines = mesh.local.logs(log).read_text().splitlines()
    stamps = [json.loads(line)["timestamp"] for line in lines if f'"event": "{event}"' in line]
    return datetime.fromisoformat(stamps[-1]).timestamp() - time.time() + time.monotonic()


@pytest.mark.parametrize("names", [("stage-0",), ("expert-0", "expert-1")], ids=["the only stage", "both expert nodes"])
def test_a_crash_that_leaves_no_token_possible_is_seen_and_its_repair_too(
    mesh: ServedMesh, watch: ReadinessWatch, names: tuple[str, ...]
) -> None:
    with restarts_delayed(mesh, names):
        fault(mesh, watch, signal.SIGKILL, names, CRASH_SEEN_WITHIN_S)
        time.sleep(RESTART_DELAY_S)
        assert not watch.turns[-1].ready, "it stays false for as long as they are gone"
    back_s = time.monotonic()
    ready_s = watch.seconds_until(True, back_s, READY_AGAIN_WITHIN_S, time.monotonic)
    whole_s = last_part_came_s(mesh, names)
    asked_s = time.monotonic()
    answer = mesh.client.ask(Ask((3, 50, 60), max_tokens=4, ignore_eos=True))
    took_s = time.monotonic() - asked_s
    print(f"\n{', '.join(names)} restarted: /ready true after {ready_s:.3f} s; 4 tokens then took {took_s:.3f} s")
    print(f"the last part that was missing had come {back_s + ready_s - whole_s:.3f} s before /ready said so")
    assert len(answer.token_ids) == 4, "what is ready makes tokens"


@pytest.mark.parametrize("names", [("stage-0",), ("expert-0", "expert-1")], ids=["the only stage", "both expert nodes"])
@pytest.mark.parametrize(
    "under_load", [pytest.param(False, marks=pytest.mark.slow), True], ids=["in silence", "under load"]
)
def test_a_hang_that_leaves_no_token_possible_is_seen_and_its_end_too(
    mesh: ServedMesh, watch: ReadinessWatch, names: tuple[str, ...], under_load: bool
) -> None:
    asks = [Ask((3 + number, 50, 60), max_tokens=600, ignore_eos=True) for number in range(2 if under_load else 0)]
    with RunningStreams(mesh.local.url, mesh.client.model, asks) as running:
        if under_load:
            wait_until(lambda: running.all_have_tokens, 20, "tokens of every stream")
        stopped = pids(mesh, *names)
        try:
            fault(mesh, watch, signal.SIGSTOP, names, HANG_SEEN_WITHIN_S)
            time.sleep(RESTART_DELAY_S)
            assert not watch.turns[-1].ready, "it stays false for as long as they hang"
        finally:
            at_s = time.monotonic()
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        ready_s = watch.seconds_until(True, at_s, READY_AGAIN_WITHIN_S, time.monotonic)
        print(
            f"\nSIGCONT of {', '.join(names)}: /ready true after {ready_s:.3f} s (they come back as other incarnations)"
        )


@pytest.mark.slow
def test_a_blink_of_a_stage_ends_in_ready(mesh: ServedMesh, watch: ReadinessWatch) -> None:
    """Shorter than any witness: nobody is taken for dead, and a canary is answered late."""
    (pid,) = pids(mesh, "stage-0")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.3)
    os.kill(pid, signal.SIGCONT)
    time.sleep(2.0)
    assert watch.turns[-1].ready
    assert pids(mesh, "stage-0") == [pid]


def test_a_router_that_hangs_says_nothing_and_then_the_truth(mesh: ServedMesh, watch: ReadinessWatch) -> None:
    (pid,) = pids(mesh, "router-0")
    at_s = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        seen_s = watch.seconds_until(False, at_s, HANG_SEEN_WITHIN_S, time.monotonic)
    finally:
        back_s = time.monotonic()
        os.kill(pid, signal.SIGCONT)
    ready_s = watch.seconds_until(True, back_s, READY_AGAIN_WITHIN_S, time.monotonic)
    print(f"\nSIGSTOP of the router: no answer after {seen_s:.3f} s; SIGCONT: /ready true after {ready_s:.3f} s")
