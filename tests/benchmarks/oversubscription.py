"""A mesh under load beside busy processes, with no fault: how many nodes are taken for dead, or /ready for false?

    python -m tests.benchmarks.oversubscription --minutes 60
    python -m tests.benchmarks.oversubscription --minutes 60 --set SPARES=2     # with mirrors: early deaths, too
    python -m tests.benchmarks.oversubscription --minutes 60 --trace trace.txt  # then: ... silence_curve trace.txt

Busy processes take twice the processors that there are, beside the mesh's own work. Prints JSON and then one line; ends
with status 1 if a node was taken for dead, or a step or a stream failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from common.processes.supervisor import LocalMesh
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.served.mesh_client import Ask, mesh_client
from tests.support.served.metrics_text import read_metrics
from tests.support.served.readiness_watch import ReadinessWatch
from tests.support.served.streams import RunningStreams

OVERSUBSCRIPTION = 2
READY_WITHIN_S = 300
TOKENS_A_STREAM = 256


@dataclass(frozen=True)
class Outcome:
    """What was seen from the moment that the mesh was ready and the busy processes ran."""

    minutes: float
    processors: int
    busy_processes: int
    mesh_processes: int
    load_average: float
    streams: int
    tokens: int
    failed_streams: int
    false_deaths: int
    """`node_lost` in the router's log."""
    suspicions: int
    """`node_state` with `suspect`."""
    failed_steps: int
    times_not_ready: int
    seconds_not_ready: float
    said_not_ready: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Nobody was taken for dead and no stream failed."""
        return not (self.false_deaths or self.failed_streams or self.failed_steps)

    def line(self) -> str:
        """For people."""
        return (
            f"{self.minutes:.1f} min, {self.busy_processes} busy processes on {self.processors} processors: "
            f"{self.false_deaths} false deaths, {self.suspicions} suspicions, {self.times_not_ready} times not ready, "
            f"{self.failed_streams} of {self.streams} streams failed, {self.tokens} tokens"
        )


def _spin(parent: int) -> None:
    """Until its parent is gone."""
    while os.getppid() == parent:
        sum(range(100_000))


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute for nothing."""
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_spin, args=(os.getpid(),), daemon=True) for _ in range(count)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def events_of(log: Path, skip_bytes: int) -> Counter[str]:
    """Names of the events in a log of JSON lines, after the first `skip_bytes`; a node's new state is part of it."""
    counts: Counter[str] = Counter()
    with log.open("rb") as lines:
        lines.seek(skip_bytes)
        for line in lines:
            if line.startswith(b"{"):
                fields = json.loads(line)
                counts[" ".join(filter(None, (fields.get("event", ""), fields.get("state", ""))))] += 1
    return counts


def run_under_load(local: LocalMesh, minutes: float, num_streams: int) -> Outcome:
    """Rounds of streams, one after another, until the time is up."""
    log = local.logs("router-0")
    num_busy = OVERSUBSCRIPTION * (os.cpu_count() or 1)
    with (
        mesh_client(local.url) as client,
        busy_processes(num_busy),
        ReadinessWatch(local.url, timeout_s=5.0) as watch,
    ):
        skip_bytes, begun_s = log.stat().st_size, time.monotonic()
        failed_before = read_metrics(client.get("/metrics").text).value("moemesh_failed_steps_total")
        streams = failed = tokens = 0
        while time.monotonic() - begun_s < 60 * minutes:
            asks = [
                Ask((3 + number, 50, 60), TOKENS_A_STREAM, 1.0, streams + number, ignore_eos=True)
                for number in range(num_streams)
            ]
            with RunningStreams(local.url, client.model, asks) as running:
                pass
            streams += len(asks)
            failed += sum(len(stream.token_ids) != TOKENS_A_STREAM for stream in running.streams)
            tokens += sum(len(stream.token_ids) for stream in running.streams)
        ended_s = time.monotonic()
        load_average = os.getloadavg()[0]
        failed_steps = read_metrics(client.get("/metrics").text).value("moemesh_failed_steps_total") - failed_before
        turns = [turn for turn in watch.turns if begun_s <= turn.at_s <= ended_s]
    events = events_of(log, skip_bytes)
    ends = [*(turn.at_s for turn in turns[1:]), ended_s]
    return Outcome(
        minutes=(ended_s - begun_s) / 60,
        processors=os.cpu_count() or 1,
        busy_processes=num_busy,
        mesh_processes=len(local.processes()),
        load_average=load_average,
        streams=streams,
        tokens=tokens,
        failed_streams=failed,
        false_deaths=events["node_lost"],
        suspicions=events["node_state suspect"],
        failed_steps=int(failed_steps),
        times_not_ready=sum(not turn.ready for turn in turns),
        seconds_not_ready=sum(end_s - turn.at_s for turn, end_s in zip(turns, ends, strict=False) if not turn.ready),
        said_not_ready=tuple(turn.said for turn in turns if not turn.ready)[:20],
    )


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=8, help="at once")
    parser.add_argument("--model", default="", help="a checkpoint directory; default: a tiny one")
    parser.add_argument("--trace", type=Path, help="write down each silence of the router's links")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the mesh")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moemesh-"))
    try:
        model = arguments.model or str(write_tiny_checkpoint(folder / "tiny"))
        settings = dict(pair.split("=", 1) for pair in arguments.set)
        environment = {"MODEL": model, "PORT": "0", "PP": "2", "EXPERTS": "2", "KV_CACHE_TOKENS": "32768"} | settings
        modules = (
            {"router": f"tests.benchmarks.recording_router {arguments.trace.resolve()}"} if arguments.trace else {}
        )
        with LocalMesh(environment=environment, state_dir=folder / "state", modules=modules) as local:
            local.wait_ready(timeout_s=READY_WITHIN_S)
            outcome = run_under_load(local, arguments.minutes, arguments.streams)
    except httpx.HTTPError as error:
        print(f"the mesh could not be asked: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(asdict(outcome), indent=2))
    print(outcome.line())
    return 0 if outcome.is_clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
