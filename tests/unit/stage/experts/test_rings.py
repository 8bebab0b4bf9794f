"""Calls through shared memory: the same bits as by messages, and whatever goes wrong with a ring costs no call."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.compute.native_library import NativeKernels
from common.messages import Dispatch
from common.wire.call_ring import MAX_ROWS, SLOTS, ring_path
from common.wire.transport import LinkEvent
from services.expert.ring_server import RingServer
from services.stage.experts.client import CallDone
from tests.support.nodes.kernels import kernels_for, one_torch_thread
from tests.support.nodes.ring_nodes import ALL, LOG, HeldStore, IdleThread, RingMesh

__all__ = ["one_torch_thread"]
FREE, ASKED, TAKEN, ANSWERED, UNWANTED = range(5)
"""States of a slot: native/call_ring.h."""


@pytest.fixture
def kernels() -> NativeKernels:
    found = kernels_for("native")
    assert found is not None
    return found


@pytest.fixture
def mesh(tmp_path: Path, kernels: NativeKernels) -> Iterator[RingMesh]:
    """Two nodes that hold everything."""
    made = RingMesh(tmp_path, kernels, {"a": ALL, "b": ALL})
    made.open_rings()
    yield made
    made.close()


@pytest.fixture
def idle(tmp_path: Path, kernels: NativeKernels) -> Iterator[RingMesh]:
    """The same, but they are stopped."""
    made = RingMesh(tmp_path, kernels, {"a": ALL, "b": ALL}, idle=["a", "b"])
    made.open_rings()
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_slices", [1, 2])
@pytest.mark.parametrize("holdings", [{"a": ALL}, {"a": (0, 1, 2), "b": (2, 3, 4, 5)}, {"a": ALL, "b": ALL, "c": ALL}])
def test_an_answer_through_rings_has_the_bits_of_one_node_alone_and_nothing_goes_as_a_message(
    tmp_path: Path, kernels: NativeKernels, dtype: torch.dtype, num_slices: int, holdings: dict[str, tuple[int, ...]]
) -> None:
    mesh = RingMesh(tmp_path, kernels, holdings, dtype, num_slices)
    try:
        mesh.open_rings()
        for seed, num_tokens in enumerate((1, 2, 3, 7, 16, MAX_ROWS)):
            call = mesh.call(num_tokens, layer=seed % 2, seed=seed)
            mesh.start(call)
            done = mesh.finish()
            assert isinstance(done, CallDone)
            assert torch.equal(done.answer, mesh.wanted(call))
        assert not any(mesh.socket_messages().values())
        assert sum(server.counts().steps for server in mesh.servers.values()) >= 6
    finally:
        mesh.close()


def test_a_call_that_is_too_large_for_a_ring_goes_as_messages(mesh: RingMesh) -> None:
    mesh.start(mesh.call(MAX_ROWS + 1))
    assert any(isinstance(message, Dispatch) for sent in mesh.socket_messages().values() for message in sent)


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


def test_calls_that_waited_together_are_answered_each_by_its_own_rows(idle: RingMesh) -> None:
    calls = {}
    for seed in range(SLOTS):
        call = idle.call(3 + seed, layer=seed % 2, seed=seed)
        calls[idle.start(call)] = call
    wake(idle, "a", "b")
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


def test_a_question_that_changes_in_the_memory_is_not_answered_and_is_asked_again(idle: RingMesh) -> None:
    idle.start(idle.call(2))
    idle.slot("a").spoil_rows()
    wake(idle, "a", "b")
    assert isinstance(await_message(idle, "b"), Dispatch)
    assert not idle.ended


def test_an_answer_that_changes_in_the_memory_is_not_used_and_is_asked_for_again(mesh: RingMesh) -> None:
    slot, until_s = mesh.slot("a"), time.monotonic() + 5
    mesh.start(mesh.call(8))
    while slot.state != ANSWERED and time.monotonic() < until_s:
        time.sleep(0.001)
    slot.spoil_answer()
    assert isinstance(await_message(mesh, "b"), Dispatch)
    assert not mesh.ended


def test_a_node_that_hangs_is_hedged_by_a_message_and_its_slot_is_free_only_after_it_has_finished(
    tmp_path: Path, kernels: NativeKernels
) -> None:
    mesh = RingMesh(tmp_path, kernels, {"a": ALL, "b": ALL}, idle=["a"])
    mesh.open_rings()
    try:
        slot = mesh.slot("a")
        mesh.start(mesh.call(8))
        assert slot.state == ASKED
        slot.take()
        assert isinstance(await_message(mesh, "b"), Dispatch)
        mesh.client.abandon()
        assert slot.state == UNWANTED
    finally:
        mesh.close()


def test_a_call_that_nobody_has_begun_frees_its_slot_when_it_is_given_up(idle: RingMesh) -> None:
    idle.start(idle.call(8))
    assert idle.slot("a").state == ASKED
    idle.client.abandon()
    assert idle.slot("a").state == FREE
    assert {node.outstanding_rows for node in idle.client.nodes} == {0}


def test_a_node_whose_link_closes_loses_its_rows_to_another_at_once(idle: RingMesh) -> None:
    idle.start(idle.call(8))
    idle.socket("a").events.append(LinkEvent.CLOSED)
    idle.poll()
    sent = idle.socket_messages()
    assert any(isinstance(message, Dispatch) for message in sent["b"])
    assert not sent["a"]


def test_a_ring_whose_node_has_gone_is_given_up_and_calls_go_as_messages(mesh: RingMesh) -> None:
    mesh.servers["a"].close()
    until_s = time.monotonic() + 5
    while mesh.rings.num_open > 1 and time.monotonic() < until_s:
        mesh.rings.look(time.monotonic())
    assert mesh.rings.num_open == 1
    mesh.start(mesh.call(2))
    assert any(isinstance(message, Dispatch) for sent in mesh.socket_messages().values() for message in sent)


def test_a_node_that_cuts_its_experts_anew_gets_new_rings(mesh: RingMesh, kernels: NativeKernels) -> None:
    store = HeldStore(kernels, torch.float32, 1)
    for shard, expert in mesh.experts.items():
        store.put(shard, expert)
    mesh.stores["a"] = store
    mesh.look()
    until_s = time.monotonic() + 5
    while mesh.rings.num_open == 2 and time.monotonic() < until_s:
        mesh.rings.look(time.monotonic())
    while mesh.rings.num_open < 2 and time.monotonic() < until_s:
        mesh.poll()
    call = mesh.call(3)
    mesh.start(call)
    done = mesh.finish()
    assert isinstance(done, CallDone)
    assert torch.equal(done.answer, mesh.wanted(call))


def test_a_file_that_was_removed_is_made_again(mesh: RingMesh, tmp_path: Path) -> None:
    path = ring_path(tmp_path, "a")
    path.unlink()
    until_s = time.monotonic() + 5
    while not path.exists() and time.monotonic() < until_s:
        mesh.look()
    assert path.is_socket()


def test_files_of_nodes_that_were_killed_are_removed_by_the_next_one(tmp_path: Path, kernels: NativeKernels) -> None:
    left = ring_path(tmp_path, "killed")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(left))
    server = RingServer(tmp_path, "next", 1, kernels, LOG)
    assert not left.exists()
    server.close()


def test_a_stage_and_a_node_give_back_every_descriptor(tmp_path: Path, kernels: NativeKernels) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        mesh = RingMesh(folder, kernels, {"a": ALL, "b": ALL})
        mesh.open_rings()
        mesh.close()
    assert len(os.listdir("/proc/self/fd")) == before


def wake(mesh: RingMesh, *names: str) -> None:
    for name in names:
        thread = mesh.thread(name)
        assert isinstance(thread, IdleThread)
        thread.wake()


def await_message(mesh: RingMesh, name: str) -> object:
    """The first message that a node gets."""
    until_s = time.monotonic() + 5
    while time.monotonic() < until_s:
        mesh.poll()
        if messages := mesh.socket_messages()[name]:
            return messages[0]
    return None
