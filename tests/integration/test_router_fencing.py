"""A router that was stopped while another one took its folder wakes up, and has no say any more."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.processes.supervisor import LocalMesh
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.waiting import wait_until
from tests.support.served.resumable import ResumableStream, RunningResumableStreams
from tests.support.served.served_mesh import served_mesh

COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": [3, 70, 80],
    "max_tokens": 300,
    "temperature": 1,
    "seed": 11,
    "logprobs": 2,
    "ignore_eos": True,
    "return_token_ids": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.mark.slow
def test_stopped_router_whose_folder_was_taken_ends_when_it_wakes_up_and_its_streams_go_on(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    with served_mesh(model, {"PP": "2", "EXPERTS": "1", "COPIES": "1"}) as mesh:
        local = mesh.local
        calm = ResumableStream("calm", COMPLETIONS, BODY)
        with RunningResumableStreams(lambda: local.url, [calm]):
            pass
        stream = ResumableStream("stopped", COMPLETIONS, BODY)
        stopped = local.children["router-0"].process
        assert stopped is not None
        with RunningResumableStreams(lambda: local.url, [stream]):
            wait_until(lambda: stream.has_tokens, 30, "first tokens", 0.005)
            stopped.send_signal(signal.SIGSTOP)
            try:
                refused = start_second_router(local)
                assert refused.returncode == 1
                assert b"another router runs on STATE_DIR" in refused.stderr, "the lock outlasts the stop"
                # As by a router of another host, on a folder whose locks do not travel.
                newer = local.state_dir / "router.json.new"
                newer.write_text('{"term": 2}')
                newer.replace(local.state_dir / "router.json")
            finally:
                stopped.send_signal(signal.SIGCONT)
            assert stopped.wait(30) == 1
        assert "router_fenced" in local.logs("router-0").read_text()
        assert stream.errors == []
        assert stream.num_attachments > 1
        assert stream.choices == calm.choices


def start_second_router(local: LocalMesh) -> subprocess.CompletedProcess[bytes]:
    """To its end: it is refused."""
    first = local.children["router-0"]
    command = [sys.executable, "-m", first.module]
    return subprocess.run(command, env=first.environment, capture_output=True, timeout=60, check=False)
