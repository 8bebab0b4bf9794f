"""OpenVINO GenAI's continuous batching. It has no server of its own: a process of its environment, asked by lines."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.benchmarks.streaming_client import StreamTimes

WORKER = Path(__file__).with_name("openvino_worker.py")
ENDED_WITHIN_S = 30


@dataclass(frozen=True)
class OpenVinoEngine:
    """The process's ends. Its clock is this process's: both read the kernel's monotonic one."""

    orders: IO[str]
    answers: IO[str]
    log_path: Path

    def run_round(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Sequence[StreamTimes]:
        """As `Engine`."""
        self.orders.write(json.dumps({"prompts": list(map(list, prompts)), "max_tokens": max_tokens}) + "\n")
        self.orders.flush()
        answer = json.loads(self.next_line())
        streams = tuple(
            StreamTimes(answer["sent_s"], tuple((at_s, count) for at_s, count in arrivals))
            for arrivals in answer["arrivals"]
        )
        for stream in streams:
            if stream.num_tokens != max_tokens:
                raise RuntimeError(f"asked for {max_tokens} tokens, got {stream.num_tokens}")
        return streams

    def next_line(self) -> str:
        """Raises RuntimeError with the process's last words if it has ended."""
        if line := self.answers.readline():
            return line.strip()
        words = self.log_path.read_text(errors="replace").splitlines()
        raise RuntimeError(f"OpenVINO's process ended: {words[-1] if words else 'it gave no reason'}")


@contextmanager
def openvino_engine(home: Path, exported: Path, threads: int) -> Iterator[OpenVinoEngine]:
    """The process lives as long as the block."""
    command = [str(home / "venv" / "bin" / "python"), str(WORKER), str(exported), str(threads)]
    log_path = home / "worker.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdin, "it has pipes"
    assert process.stdout, "it has pipes"
    try:
        engine = OpenVinoEngine(process.stdin, process.stdout, log_path)
        # The library itself may have something to say first.
        while engine.next_line() != "ready":
            pass
        yield engine
    finally:
        process.stdin.close()
        try:
            process.wait(ENDED_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
