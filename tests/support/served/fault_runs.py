"""A fault under streams: nobody notices but the clock.

Eight streams, greedy and sampled, and whole answers with log-probabilities beside them. Their tokens and
log-probabilities are those of the run without a fault, bit by bit. The longest time without a token is printed (`-s`
shows it); how short it must be is for the chaos suites to judge: it says as much about the machine that runs the test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from tests.support.processes.waiting import wait_until
from tests.support.served.mesh_client import Answer, Ask
from tests.support.served.metrics_text import read_metrics
from tests.support.served.served_mesh import ServedMesh
from tests.support.served.streams import RunningStreams, Stream

TOKENS = 160


def asks(num_tokens: int = TOKENS) -> list[Ask]:
    greedy = [Ask((3 + number, 70, 80), num_tokens, ignore_eos=True) for number in range(4)]
    sampled = [
        Ask((9 + number, 7), num_tokens, temperature=1.0, seed=11 + number, ignore_eos=True) for number in range(4)
    ]
    # Of what its last stage keeps and counts, a sequence that goes on elsewhere must be told anew.
    penalised = [replace(ask, repetition_penalty=1.3) for ask in (greedy[0], *sampled[:3])]
    return [*greedy[1:], *sampled[3:], *penalised]


def metric(mesh: ServedMesh, name: str) -> float:
    return read_metrics(mesh.client.get("/metrics").text).value(name)


def pid_of(mesh: ServedMesh, name: str) -> int:
    process = mesh.local.children[name].process
    assert process is not None
    return process.pid


@contextmanager
def answers_under_way(mesh: ServedMesh, num_tokens: int = TOKENS) -> Iterator[list[Answer]]:
    """Whole answers with log-probabilities, asked for beside the streams."""
    answers: list[Answer] = []
    asked = asks(num_tokens)
    with ThreadPoolExecutor(len(asked)) as pool:
        futures = [pool.submit(mesh.client.ask, ask) for ask in asked]
        yield answers
        answers.extend(future.result() for future in futures)


def longest_gap_s(streams: list[Stream], since_s: float) -> float:
    return max(stream.longest_silence_s(since_s) for stream in streams)


def run_through(
    mesh: ServedMesh,
    undisturbed: list[Answer],
    what: str,
    fault: Callable[[], None],
    max_gap_s: float,
    num_tokens: int = TOKENS,
) -> None:
    """Load, a fault in the middle of it, and nothing else than without. `num_tokens`: of each answer."""
    asked = asks(num_tokens)
    with (
        answers_under_way(mesh, num_tokens) as answers,
        RunningStreams(mesh.local.url, mesh.client.model, asked) as running,
    ):
        wait_until(lambda: all(len(stream.token_ids) > 20 for stream in running.streams), 60, "tokens on every stream")
        began_s = time.monotonic()
        fault()
    assert all(len([at for at in stream.arrivals_s if at > began_s]) > 20 for stream in running.streams), "work in hand"
    gap_s = longest_gap_s(running.streams, began_s)
    print(f"\n{what}: longest gap {gap_s * 1000:.0f} ms")
    for stream, expected in zip(running.streams, undisturbed, strict=True):
        assert (stream.broke_off, stream.error) == ("", None), what
        assert tuple(stream.token_ids) == expected.token_ids, what
    assert answers == undisturbed, "tokens and log-probabilities"
    assert gap_s < max_gap_s
