"""Placements by another process: the same answers, whatever becomes of the process."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from common.ids import NodeId
from services.router.control.experts.placement import ExpertNodeCapacity
from services.router.control.experts.placing import PlacementAnswer, PlacementRequest, answer_request
from services.router.control.experts.shard_bits import pack
from services.router.mesh import placer
from services.router.mesh.placement_process import LENGTH, decode_answer, decode_request, encode
from services.router.mesh.placer import ProcessPlacer
from tests.support.processes.waiting import wait_until

NO_ANSWER = "import sys; sys.stdout.buffer.write(bytes([3, *[0] * 7]) + b'abc'); sys.stdout.flush(); sys.stdin.read()"
ROUTER = """
import time
import structlog
from services.router.mesh.placer import ProcessPlacer
from tests.support.processes.waiting import wait_until
from tests.unit.router.mesh.test_placer import request_of
placer = ProcessPlacer(lambda: print(placer._process.pid, flush=True), structlog.get_logger())
placer.start()
placer.begin(request_of(2))
time.sleep(60)
"""


class Placing:
    """A placer, what it logs, and a wait for its answers."""

    def __init__(self, **changes: Any) -> None:
        self.logged = structlog.testing.CapturingLogger()
        log: Any = structlog.wrap_logger(self.logged, processors=[])
        self.has_answer = threading.Event()
        self.placer = ProcessPlacer(self.has_answer.set, log, **changes)
        self.placer.start()

    def answer(self, request: PlacementRequest) -> PlacementAnswer | None:
        self.has_answer.clear()
        self.placer.begin(request)
        assert self.has_answer.wait(30.0)
        return self.placer.pop_answer()

    @property
    def events(self) -> list[str]:
        return [str(call.args[0] if call.args else call.kwargs.get("event")) for call in self.logged.calls]


@pytest.fixture
def placing() -> Iterator[Placing]:
    made = Placing()
    yield made
    made.placer.close()


def request_of(num_nodes: int, version: int = 7, capacity_bytes: int = 1000) -> PlacementRequest:
    nodes = [ExpertNodeCapacity(NodeId(f"n{i}"), f"h{i}", capacity_bytes, "cpu") for i in range(num_nodes)]
    nothing = pack(np.zeros((len(nodes), 12), dtype=np.bool_))
    ids = tuple(node.node_id for node in nodes)
    return PlacementRequest(version, (3, 4, 1), (0, 1, 2), 10, 2, tuple(nodes), ids, nothing, nothing)


def is_same(answer: PlacementAnswer | None, request: PlacementRequest) -> bool:
    expected = answer_request(request)
    assert answer is not None
    assert np.array_equal(answer.owners, expected.owners)
    names = ("version", "node_ids", "missing_copies", "unseen", "has_room", "problem")
    return all(getattr(answer, name) == getattr(expected, name) for name in names)


def test_another_process_gives_the_answers_that_this_one_would_give(placing: Placing) -> None:
    for request in (request_of(3), request_of(1, version=8), request_of(2, capacity_bytes=50)):
        assert is_same(placing.answer(request), request)
    assert placing.placer.pop_answer() is None


def test_a_process_that_is_killed_is_replaced_and_asked_again(placing: Placing) -> None:
    assert is_same(placing.answer(request_of(2)), request_of(2))
    process = placing.placer._process
    assert process is not None
    process.kill()
    process.wait()
    assert is_same(placing.answer(request_of(3)), request_of(3))
    assert "placement_computed_in_router" not in placing.events


@pytest.mark.parametrize(
    "command",
    [
        (sys.executable, "-c", "pass"),
        (sys.executable, "-c", "import time; time.sleep(99)"),
        (sys.executable, "-c", NO_ANSWER),
        ("/no/such",),
    ],
)
def test_where_no_process_answers_in_time_the_router_computes_the_placement_itself(command: tuple[str, ...]) -> None:
    placing = Placing(command=command, answer_limit_s=0.3)
    assert is_same(placing.answer(request_of(3)), request_of(3))
    assert "placement_computed_in_router" in placing.events
    placing.placer.close()
    assert placing.placer._process is None


def test_a_placement_that_cannot_be_computed_costs_what_would_have_moved_and_not_the_router() -> None:
    placing = Placing(command=("/no/such",))
    held = np.zeros(12, dtype=np.bool_)
    held[3] = True
    request = replace(request_of(2), ready=pack(np.array([held, np.zeros(12, dtype=np.bool_)])))
    object.__setattr__(request, "copies", 0)
    answer = placing.answer(request)
    assert answer is not None
    assert (answer.version, answer.has_room, "COPIES is 0" in answer.problem) == (request.version, False, True)
    assert [answer.node_ids[number - 1] for number in answer.owners[:, 3].tolist() if number] == ["n0"]
    assert np.count_nonzero(answer.owners) == 1
    assert "placement_failed" in placing.events
    object.__setattr__(request, "copies", 1)
    assert is_same(placing.answer(request), request), "the next one is computed as ever"
    placing.placer.close()


def test_a_process_that_was_stopped_is_replaced_long_before_the_limit(
    placing: Placing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placer, "STILL_S", 0.5)
    assert is_same(placing.answer(request_of(2)), request_of(2))
    process = placing.placer._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    assert is_same(placing.answer(request_of(3)), request_of(3))
    assert placing.events.count("placement_process_lost") == 1
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("looks", "used_s", "limit_s", "reason"),
    [
        (20, 0.01, 60.0, ""),
        (20, None, 60.0, ""),
        (20, 0.0, 60.0, "no processor time"),
        (20, 0.01, 0.03, r"within 0\.03 s"),
    ],
)
def test_a_process_that_gets_processor_time_is_waited_for_until_the_limit(
    looks: int, used_s: float | None, limit_s: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`used_s` from one look to the next; after `looks` it answers."""
    monkeypatch.setattr(placer, "LOOK_S", 0.01)
    monkeypatch.setattr(placer, "STILL_S", 0.05)
    reader, writer = os.pipe()
    num_looks = itertools.count(1)

    def cpu_seconds() -> float | None:
        if (number := next(num_looks)) == looks:
            os.write(writer, b"!")
        return None if used_s is None else used_s * number

    with os.fdopen(reader), os.fdopen(writer, "wb"):
        raises = pytest.raises(TimeoutError, match=reason) if reason else contextlib.nullcontext()
        with raises:
            placer.ProcessPatience(limit_s, cpu_seconds).wait(reader, select.POLLIN)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_no_process_outlives_a_router_that_is_killed_even_a_stopped_one() -> None:
    with subprocess.Popen([sys.executable, "-c", ROUTER], stdout=subprocess.PIPE, text=True) as router:
        assert router.stdout is not None
        pid = int(router.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        router.kill()
    wait_until(lambda: not is_running(pid), 10.0, "the end of the process that computes placements")


def is_running(pid: int) -> bool:
    """Whoever inherits it may let it lie as a zombie for a while."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_nodes_with_parts_and_none_at_all_survive_the_pipe() -> None:
    parts = request_of(2)
    seeing = tuple(replace(node, experts=frozenset({number})) for number, node in enumerate(parts.nodes))
    for request in (replace(parts, nodes=seeing), request_of(0)):
        back = decode_request(encode(request)[LENGTH.size :])
        assert (back.nodes, back.holders, back.shape) == (request.nodes, request.holders, request.shape)
        assert np.array_equal(back.ready, request.ready)
        assert is_same(decode_answer(encode(answer_request(back))[LENGTH.size :]), request)
