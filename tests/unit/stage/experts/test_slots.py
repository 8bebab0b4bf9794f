"""What holds of calls in slots, whether the slots lie in shared memory or travel over links."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.compute.native_library import NativeKernels
from common.messages import Dispatch
from common.wire.call_ring import SLOTS
from services.stage.experts.client import CallDone
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.ring_nodes import ALL, RingMesh, await_message, kernels

__all__ = ["kernels", "one_torch_thread"]
NODES = ("a", "b")
"""Each holds everything."""


@pytest.fixture(params=[(), NODES, ("b",)], ids=["rings", "links", "both"])
def linked(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Nodes that are reached by links."""
    found: tuple[str, ...] = request.param
    return found


@pytest.fixture
def mesh(tmp_path: Path, kernels: NativeKernels, linked: tuple[str, ...]) -> Iterator[RingMesh]:
    """A stage and nodes that answer."""
    made = RingMesh(tmp_path, kernels, dict.fromkeys(NODES, ALL), linked=linked)
    made.open_rings()
    yield made
    made.close()


@pytest.fixture
def idle(tmp_path: Path, kernels: NativeKernels, linked: tuple[str, ...]) -> Iterator[RingMesh]:
    """The same, but they are stopped."""
    made = RingMesh(tmp_path, kernels, dict.fromkeys(NODES, ALL), linked=linked, idle=NODES)
    made.open_rings()
    yield made
    made.close()


def test_more_calls_than_slots_go_as_messages(idle: RingMesh) -> None:
    for seed in range(SLOTS):
        idle.start(idle.call(8, seed=seed))
    assert not any(idle.socket_messages().values())
    idle.start(idle.call(8))
    assert any(idle.socket_messages().values())


def test_answers_of_several_calls_at_a_time_are_not_mixed_up(mesh: RingMesh) -> None:
    calls = {}
    for seed in range(40):
        batch = [mesh.call(1 + (seed * 7 + i) % 20, layer=i % 2, seed=seed * 3 + i) for i in range(2)]
        for call in batch:
            calls[mesh.start(call)] = call
        for _ in batch:
            done = mesh.finish()
            assert isinstance(done, CallDone)
            assert torch.equal(done.answer, mesh.wanted(calls.pop(done.number)))
    assert not calls
    assert not any(mesh.socket_messages().values())


def test_calls_that_waited_together_are_answered_each_by_its_own_rows(idle: RingMesh) -> None:
    calls = {}
    for seed in range(SLOTS):
        call = idle.call(3 + seed, layer=seed % 2, seed=seed)
        calls[idle.start(call)] = call
    idle.wake("a", "b")
    while calls:
        done = idle.finish()
        assert isinstance(done, CallDone)
        assert torch.equal(done.answer, idle.wanted(calls.pop(done.number)))


def test_a_shard_that_was_let_go_is_asked_of_another_node_in_a_message(mesh: RingMesh) -> None:
    for shard in list(mesh.stores["a"]):
        mesh.stores["a"].drop(shard)
    mesh.start(mesh.call(4))
    assert isinstance(await_message(mesh, "b"), Dispatch)
    assert mesh.client.counters.resent == 1
