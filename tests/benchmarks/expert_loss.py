"""What one of N expert nodes costs when it is killed and the others have capacity to spare: tokens/s before and after.

    python -m tests.benchmarks.expert_loss --pairs 20

Expert nodes of a fixed service time (see fixed_time_expert.py). Each pair is a window before and a window from the kill
on, under the same streams. Prints JSON and then the median ratio with a 95% interval (order statistics: no distribution
is assumed).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common.processes.supervisor import LocalMesh
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.waiting import wait_until
from tests.support.served.mesh_client import Ask, mesh_client
from tests.support.served.metrics_text import read_metrics
from tests.support.served.streams import RunningStreams, Stream

STREAMS = 16
TOKENS = 500
READY_WITHIN_S = 180


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Between which values the median lies, by the binomial distribution of how many lie below it."""
    ordered, count = sorted(values), len(values)
    below, rank = 0.0, 0
    while below + math.comb(count, rank) / 2**count <= (1 - confidence) / 2:
        below += math.comb(count, rank) / 2**count
        rank += 1
    lowest = max(0, rank - 1)
    return ordered[lowest], ordered[count - 1 - lowest]


def tokens_between(streams: Sequence[Stream], begin_s: float, end_s: float) -> int:
    """Events of all streams; each is a token here."""
    return sum(begin_s <= at_s < end_s for stream in streams for at_s in stream.arrivals_s)


def one_pair(mesh: LocalMesh, url: str, model: str, window_s: float, seed: int) -> tuple[float, float]:
    """Tokens/s before and after the last expert node is killed; it is back when this returns."""
    victim = max(name for name in mesh.children if name.startswith("expert"))
    asks = [Ask((3 + number, 5), TOKENS, 1.0, seed * STREAMS + number, ignore_eos=True) for number in range(STREAMS)]
    with RunningStreams(url, model, asks) as running:
        wait_until(lambda: all(len(stream.token_ids) > 5 for stream in running.streams), 60, "tokens on every stream")
        begin_s = time.monotonic()
        time.sleep(window_s)
        child = mesh.children[victim]
        assert child.process is not None
        child.is_wanted = False  # it stays away for the whole window
        killed_s = time.monotonic()
        os.kill(child.process.pid, signal.SIGKILL)
        time.sleep(window_s)
        end_s = time.monotonic()
    if any(stream.error or stream.broke_off or len(stream.token_ids) != TOKENS for stream in running.streams):
        raise RuntimeError("a stream failed")
    if min(stream.ended_s for stream in running.streams) < end_s:
        raise RuntimeError("streams ended within the window: give a longer service time or a shorter window")
    before = tokens_between(running.streams, begin_s, killed_s) / (killed_s - begin_s)
    after = tokens_between(running.streams, killed_s, end_s) / (end_s - killed_s)
    mesh.start(victim)
    with mesh_client(url) as client:
        wait_until(lambda: _is_whole(client.get("/metrics").text), READY_WITHIN_S, "all expert nodes")
    time.sleep(1.0)
    return before, after


def _is_whole(text: str) -> bool:
    metrics = read_metrics(text)
    return metrics.by_label("moemesh_nodes", "kind")["expert"] == 3 and metrics.value("moemesh_missing_copies") == 0


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--window-s", type=float, default=3.0)
    parser.add_argument("--service-ms", type=float, default=4.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loss-") as folder:
        model = write_tiny_checkpoint(Path(folder) / "tiny")
        environment = {"MODEL": str(model), "PORT": "0", "PP": "2", "EXPERTS": "3", "COPIES": "2"}
        modules = {"expert": f"tests.benchmarks.fixed_time_expert {arguments.service_ms}"}
        with LocalMesh(environment=environment, state_dir=Path(folder) / "state", modules=modules) as mesh:
            mesh.wait_ready(READY_WITHIN_S)
            with mesh_client(mesh.url) as client:
                wait_until(lambda: _is_whole(client.get("/metrics").text), READY_WITHIN_S, "all expert nodes")
                name = client.model
            pairs = [one_pair(mesh, mesh.url, name, arguments.window_s, seed) for seed in range(arguments.pairs)]
    ratios = [after / before for before, after in pairs]
    low, high = median_interval(ratios)
    print(json.dumps({"pairs": pairs, "ratios": ratios}, indent=2))
    print(
        f"{len(pairs)} pairs: {statistics.median(before for before, _ in pairs):.0f} tokens/s before; after the loss "
        f"{statistics.median(ratios):.1%} of it, 95% interval of the median {low:.1%} to {high:.1%}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
