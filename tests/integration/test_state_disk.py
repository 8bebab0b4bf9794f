"""What the disk under STATE_DIR may do to a running router: it hangs, or its files are removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.process_table import is_alive
from tests.support.processes.waiting import wait_until
from tests.support.served.metrics_text import read_metrics
from tests.support.served.resumable import ResumableStream, RunningResumableStreams
from tests.support.served.served_mesh import ServedMesh, served_mesh

COMPLETIONS = "/v1/completions"
ANSWERS_WITHIN_S = 3.0
"""A router that waits for its disk STUCK_AFTER_S, on a machine that has more to do."""
ENDS_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(Path(tmp_path_factory.mktemp("disk")) / "tiny")


@pytest.fixture
def mesh(model: Path) -> Iterator[ServedMesh]:
    with served_mesh(model, {"PP": "1", "EXPERTS": "1", "COPIES": "1"}) as served:
        yield served


def body(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": [3 + number, 70, 80],
        "max_tokens": 400,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | fields


def router_of(mesh: ServedMesh) -> int:
    return dict(mesh.local.processes())["router-0"]


@contextmanager
def hanging_disk(mesh: ServedMesh) -> Iterator[None]:
    """Who opens the router's term file waits, as for a disk that does not answer: it is a pipe without a writer."""
    path = mesh.local.state_dir / "router.json"
    text = path.read_text()
    pipe = path.with_name("pipe")
    os.mkfifo(pipe)
    pipe.replace(path)
    try:
        yield
    finally:
        whole = path.with_name("whole")
        whole.write_text(text)
        answering = threading.Thread(target=answer, args=(path, text), daemon=True)
        answering.start()
        answering.join(5)
        whole.replace(path)


def answer(pipe: Path, text: str) -> None:
    """Let whoever has opened it read the file."""
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nobody reads: the router has ended
        return
    os.write(descriptor, text.encode())
    os.close(descriptor)


def get(mesh: ServedMesh, path: str, url: str = "") -> httpx.Response:
    return httpx.get((url or mesh.local.url) + path, timeout=ANSWERS_WITHIN_S, trust_env=False)


def test_while_the_disk_hangs_running_requests_go_on_and_the_router_says_what_is_wrong(mesh: ServedMesh) -> None:
    url = mesh.local.url
    streams = [ResumableStream(f"running-{number}", COMPLETIONS, body(number)) for number in range(4)]
    with RunningResumableStreams(lambda: url, streams) as running:
        wait_until(lambda: all(stream.has_tokens for stream in running.streams), 30, "first tokens", 0.005)
        with hanging_disk(mesh):
            wait_until(lambda: get(mesh, "/ready").status_code == 503, 10, "the router's word", 0.05)
            assert "the disk under STATE_DIR has not answered for" in get(mesh, "/ready").json()["detail"]
            assert get(mesh, "/health").status_code == 200
            assert read_metrics(get(mesh, "/metrics").text).value("moemesh_journal_stuck_seconds") > 1
            asked_s = time.monotonic()
            refused = httpx.post(
                url + COMPLETIONS, json=body(9, stream=False, stream_options=None), timeout=30, trust_env=False
            )
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "journal_unavailable")
            assert time.monotonic() - asked_s < ANSWERS_WITHIN_S
            wait_until(lambda: all(stream.is_done for stream in running.streams), 60, "their ends", 0.05)
        wait_until(lambda: get(mesh, "/ready").status_code == 200, 10, "the disk again", 0.05)
    for stream in streams:
        assert (stream.is_done, stream.errors, stream.num_attachments) == (True, [], 1)
        assert stream.usage is not None
        assert stream.usage["moemesh"]["durable"] is False, "it was said while the disk hung"
    log = (mesh.local.state_dir / "logs" / "router-0.log").read_text()
    events = [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")]
    assert "journal_stuck" in events
    assert "journal_answers_again" in events
    wait_until(lambda: unwritten_steps(mesh) == 0, 10, "everything to be written", 0.05)
    os.kill(router_of(mesh), signal.SIGKILL)
    mesh.local.wait_ready(60)
    for stream in streams:  # what was handed on while the disk hung was caught up with
        state = httpx.get(f"{mesh.local.url}/v1/requests/{stream.name}", timeout=30, trust_env=False).json()
        assert (state["state"], state["choices"][0]["num_tokens"]) == ("finished", 400)
        assert state["reply"]["usage"]["moemesh"]["durable"] is True


def unwritten_steps(mesh: ServedMesh) -> float:
    return read_metrics(get(mesh, "/metrics").text).value("moemesh_journal_unwritten_steps")


def num_rewrites(mesh: ServedMesh, url: str) -> float:
    """`url`: as the state folder said while it was there."""
    return read_metrics(get(mesh, "/metrics", url).text).value("moemesh_journal_rewrites_total")


def test_a_router_whose_disk_hangs_ends_when_it_is_told_to(mesh: ServedMesh) -> None:
    pid = router_of(mesh)
    with hanging_disk(mesh):
        wait_until(lambda: get(mesh, "/ready").status_code == 503, 10, "the router's word", 0.05)
        told_s = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid), ENDS_WITHIN_S, "its end", 0.05)
        print(f"ended {time.monotonic() - told_s:.1f} s after SIGTERM")
    mesh.local.wait_ready(60)


@pytest.mark.parametrize("harm", ["file", "wal", "all of the journal"])
def test_a_journal_that_is_removed_under_load_loses_no_request_when_the_router_is_killed(
    mesh: ServedMesh, harm: str
) -> None:
    streams = [
        ResumableStream(f"{harm[:3]}-{number}", COMPLETIONS, body(number, max_tokens=1900)) for number in range(8)
    ]
    with RunningResumableStreams(lambda: mesh.local.url, streams) as running:
        wait_until(lambda: all(stream.has_tokens for stream in running.streams[:4]), 30, "first tokens", 0.005)
        journal = mesh.local.state_dir / "journal.sqlite3"
        wal = journal.with_name("journal.sqlite3-wal")
        for each in {"file": [journal], "wal": [wal]}.get(harm, [journal, wal]):
            each.unlink()
        late = ResumableStream(f"{harm[:3]}-late", COMPLETIONS, body(11, max_tokens=1900))
        with RunningResumableStreams(lambda: mesh.local.url, [late]):
            wait_until(lambda: late.has_tokens, 30, "a token of a request that came later", 0.005)
            time.sleep(1.2)
            assert not all(stream.is_done for stream in streams), "killed in mid-stream"
            os.kill(router_of(mesh), signal.SIGKILL)
    for stream in [*streams, late]:
        assert (stream.is_done, stream.errors) == (True, []), stream.name
    log = (mesh.local.state_dir / "logs" / "router-0.log").read_text()
    assert "journal_rewritten" in log


def test_a_state_folder_that_is_removed_loses_no_request_either(mesh: ServedMesh) -> None:
    journal = mesh.local.state_dir / "journal.sqlite3"
    stream = ResumableStream("kept", COMPLETIONS, body(1, max_tokens=20))
    with RunningResumableStreams(lambda: mesh.local.url, [stream]):
        pass
    url = mesh.local.url
    aside = mesh.local.state_dir.with_name(mesh.local.state_dir.name + "-aside")
    mesh.local.state_dir.rename(aside)
    try:
        wait_until(lambda: num_rewrites(mesh, url) == 1, 10, "the journal to be written again", 0.05)
        assert journal.exists()
    finally:
        for part in aside.iterdir():
            if not part.name.startswith("journal.") and not (mesh.local.state_dir / part.name).exists():
                part.rename(mesh.local.state_dir / part.name)
        shutil.rmtree(aside)
    os.kill(router_of(mesh), signal.SIGKILL)
    mesh.local.wait_ready(60)
    state = httpx.get(f"{mesh.local.url}/v1/requests/kept", timeout=30, trust_env=False).json()
    assert state["state"] == "finished"
