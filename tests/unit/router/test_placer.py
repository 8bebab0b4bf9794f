"""Placements by another process: the same answers, whatever becomes of the process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog

from common.ids import NodeId
from services.router.control.placement import ExpertNodeCapacity
from services.router.control.placing import PlacementAnswer, PlacementRequest, answer_request, pack
from services.router.placement_codec import LENGTH, decode_answer, decode_request, encode_answer, encode_request
from services.router.placer import ProcessPlacer


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
        return self.placer.take()

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
    nothing = pack([np.zeros(12, dtype=np.bool_) for _ in nodes], 12)
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
    assert placing.placer.take() is None


def test_a_process_that_is_killed_is_replaced_and_asked_again(placing: Placing) -> None:
    assert is_same(placing.answer(request_of(2)), request_of(2))
    process = placing.placer._process
    assert process is not None
    process.kill()
    process.wait()
    assert is_same(placing.answer(request_of(3)), request_of(3))
    assert "placement_computed_in_router" not in placing.events


@pytest.mark.parametrize(
    "command", [(sys.executable, "-c", "pass"), (sys.executable, "-c", "import time; time.sleep(99)"), ("/no/such",)]
)
def test_where_no_process_answers_in_time_the_router_computes_the_placement_itself(command: tuple[str, ...]) -> None:
    placing = Placing(command=command, answer_limit_s=0.3)
    assert is_same(placing.answer(request_of(3)), request_of(3))
    assert "placement_computed_in_router" in placing.events
    placing.placer.close()
    assert placing.placer._process is None


def test_what_the_computation_raises_is_raised_where_the_answer_is_taken() -> None:
    placing = Placing(command=("/no/such",))
    request = request_of(2)
    object.__setattr__(request, "copies", 0)
    with pytest.raises(Exception, match="COPIES is 0"):
        placing.answer(request)
    placing.placer.close()


def test_nodes_with_parts_and_none_at_all_survive_the_pipe() -> None:
    parts = request_of(2)
    seeing = tuple(replace(node, experts=frozenset({number})) for number, node in enumerate(parts.nodes))
    for request in (replace(parts, nodes=seeing), request_of(0)):
        back = decode_request(encode_request(request)[LENGTH.size :])
        assert (back.nodes, back.holders, back.shape) == (request.nodes, request.holders, request.shape)
        assert np.array_equal(back.ready, request.ready)
        assert is_same(decode_answer(encode_answer(answer_request(back))[LENGTH.size :]), request)
