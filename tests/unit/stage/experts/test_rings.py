"""Calls through shared memory: the same bits as by messages, and whatever goes wrong with a ring costs no call."""

from __future__ import annotations

import errno
import gc
import os
import socket
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from common.compute.native_library import NativeKernels
from common.messages import Dispatch, Header
from common.topology import ShardId
from common.wire.call_ring import (
    MAX_ROWS,
    SLOTS,
    USUAL_RING_BYTES,
    RingOffer,
    make_ring,
    ring_path,
    ring_shape,
    send_offer,
)
from common.wire.transport import LinkEvent
from services.expert.ring_server import OFFER_S, RingServer
from services.stage.experts.client import SOON_S, CallDone, CallFailed
from services.stage.experts.rings import FULL_S
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.ring_nodes import ALL, LOG, HeldStore, RingMesh, await_message, idle, kernels, mesh

__all__ = ["idle", "kernels", "mesh", "one_torch_thread"]
FREE, ASKED, TAKEN, ANSWERED, UNWANTED = range(5)
"""States of a slot: native/call_ring.h."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_slices", [1, 2])
@pytest.mark.parametrize("holdings", [{"a": ALL}, {"a": (0, 1, 2), "b": (2, 3, 4, 5)}, {"a": ALL, "b": ALL, "c": ALL}])
def test_an_answer_through_rings_has_the_bits_of_one_node_alone_and_nothing_goes_as_a_message(
    tmp_path: Path, kernels: NativeKernels, dtype: torch.dtype, num_slices: int, holdings: dict[str, tuple[int, ...]]
) -> None:
    mesh = RingMesh(tmp_path, kernels, holdings, dtype, num_slices)
    try:
        mesh.open_rings()
        for seed, num_tokens in enumerate((1, 2, 3, 7, 16, MAX_ROWS, MAX_ROWS + 1, 5 * MAX_ROWS + 3)):
            call = mesh.call(num_tokens, layer=seed % 2, seed=seed)
            mesh.start(call)
            done = mesh.finish()
            assert isinstance(done, CallDone)
            assert torch.equal(done.answer, mesh.wanted(call))
        assert not any(mesh.socket_messages().values())
        assert sum(server.counts().steps for server in mesh.servers.values()) >= 14
    finally:
        mesh.close()


def test_a_question_that_changes_in_the_memory_is_not_answered_and_is_asked_again(idle: RingMesh) -> None:
    idle.start(idle.call(2))
    idle.slot("a").spoil_rows()
    idle.wake("a", "b")
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
    while mesh.rings.peers.num_open > 1 and time.monotonic() < until_s:
        mesh.rings.look(time.monotonic())
    assert mesh.rings.peers.num_open == 1
    mesh.start(mesh.call(2))
    assert any(isinstance(message, Dispatch) for sent in mesh.socket_messages().values() for message in sent)


def test_a_node_that_cuts_its_experts_anew_gets_new_rings(mesh: RingMesh, kernels: NativeKernels) -> None:
    store = HeldStore(kernels, torch.float32, 1)
    for shard, expert in mesh.experts.items():
        store.put(shard, expert)
    mesh.stores["a"] = store
    mesh.look()
    until_s = time.monotonic() + 5
    while mesh.rings.peers.num_open == 2 and time.monotonic() < until_s:
        mesh.rings.look(time.monotonic())
    while mesh.rings.peers.num_open < 2 and time.monotonic() < until_s:
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
    gc.collect()  # what former tests have let go
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        mesh = RingMesh(folder, kernels, {"a": ALL, "b": ALL})
        mesh.open_rings()
        mesh.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_calls_in_rings_are_not_waited_for_one_by_one(idle: RingMesh) -> None:
    numbers = [idle.start(idle.call(2, seed=seed)) for seed in range(2)]
    began_s = time.monotonic()
    assert [idle.client.await_answer(number, time.monotonic) for number in numbers] == [None, None]
    assert time.monotonic() - began_s < SOON_S, "the bell is left to whoever hears both"


def test_a_call_in_a_ring_that_is_given_up_goes_on_in_messages_though_its_node_stays(idle: RingMesh) -> None:
    idle.start(idle.call(8))
    idle.rings.peers.give_up(idle.number("a"), time.monotonic())
    assert isinstance(await_message(idle, "b"), Dispatch)


def test_what_only_one_node_holds_is_asked_of_it_again_in_a_message_where_its_ring_is_given_up(
    tmp_path: Path, kernels: NativeKernels
) -> None:
    mesh = RingMesh(tmp_path, kernels, {"a": ALL}, idle=["a"])
    try:
        mesh.open_rings()
        mesh.start(mesh.call(4))
        mesh.rings.peers.give_up(mesh.number("a"), time.monotonic())
        assert isinstance(await_message(mesh, "a"), Dispatch)
    finally:
        mesh.close()


def test_a_ring_whose_slots_stay_taken_is_given_up_and_a_new_one_is_free(mesh: RingMesh) -> None:
    for index in range(SLOTS):
        mesh.slot("a", index).set_state(7)
    since_s = time.monotonic()
    for later_s in (0.0, 0.4, 0.8, 1.2, 1.6, FULL_S):
        assert mesh.rings.ask(1, mesh.call(8), Header(), since_s + later_s, since_s + 10) is None
    until_s = time.monotonic() + 5
    while mesh.rings.peers.num_open < 2 and time.monotonic() < until_s:
        mesh.poll()
    mesh.start(mesh.call(8))
    assert isinstance(mesh.finish(), CallDone)
    assert not any(mesh.socket_messages().values())


def test_an_answer_of_a_call_that_is_late_elsewhere_counts_as_heard(tmp_path: Path, kernels: NativeKernels) -> None:
    mesh = RingMesh(tmp_path, kernels, {"a": ALL, "b": ALL}, idle=["b"])
    try:
        mesh.open_rings()
        began_s = time.monotonic()
        mesh.start(mesh.call(8))
        assert isinstance(await_message(mesh, "a"), Dispatch)
        assert mesh.client.nodes[mesh.number("a")].heard_s >= began_s
        assert mesh.client.nodes[mesh.number("b")].heard_s < began_s
    finally:
        mesh.close()


def test_experts_that_are_cut_anew_while_calls_are_in_rings_end_those_with_an_error(idle: RingMesh) -> None:
    idle.start(idle.call(8))
    assert idle.client.apply_placement(idle.placement({"a": ALL, "b": ALL}, version=2, num_slices=2), 1, 2, 0.0)
    ended = idle.finish()
    assert isinstance(ended, CallFailed)
    assert "cut into 2" in str(ended.error)


def test_no_two_parts_have_one_number_however_many_nodes_there_are(mesh: RingMesh) -> None:
    numbers = [mesh.rings._first_number(count) for count in (3, 3, 2, 5, 1)]
    assert numbers == [1, 4, 7, 9, 14]


def test_what_connects_and_offers_nothing_is_let_go(tmp_path: Path, kernels: NativeKernels) -> None:
    now_s = 100.0
    server = RingServer(tmp_path, "a", 1, kernels, LOG, clock=lambda: now_s)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(str(ring_path(tmp_path, "a")))
        silent.settimeout(1)
        server.look(None)
        now_s += OFFER_S + 0.1
        server.look(None)
        assert silent.recv(1) == b""
    server.close()


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_bell_that_is_no_eventfd_is_refused(mesh: RingMesh, tmp_path: Path, kind: str) -> None:
    reading, bell = os.pipe() if kind == "pipe" else (os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_RDWR))
    memory, descriptor = make_ring(mesh.thread("a").shape)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stage:
        stage.connect(str(ring_path(tmp_path, "a")))
        send_offer(stage, RingOffer(1, mesh.thread("a").shape, descriptor, bell))
        mesh.look()
        stage.settimeout(1)
        assert stage.recv(1) == b""
    for each in (reading, bell, descriptor):
        os.close(each)
    del memory


def test_a_shard_that_is_loaded_twice_and_one_that_goes_live_until_whoever_computes_with_them_knows(
    mesh: RingMesh,
) -> None:
    store, shard = mesh.stores["a"], ShardId(0, 0, 0)
    seen: list[bool] = []
    store.watch(lambda changed: seen.append(store.find(shard) is not None))
    store.drop(shard)
    assert seen == [True, True], "all that are held; and before it goes"


def test_a_ring_of_a_wide_model_has_fewer_rows_and_no_more_bytes() -> None:
    for width, pairs in ((64, 2), (2048, 8), (7168, 32), (1 << 20, 64)):
        shape = ring_shape(width, 2, pairs)
        assert shape.max_rows >= 1
        assert shape.num_bytes <= USUAL_RING_BYTES + SLOTS * 4096 + shape.slots * (pairs + 1) * width * 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_of_a_nodes_name_gives_way_to_its_socket_or_is_waited_for(
    mesh: RingMesh, tmp_path: Path, kind: str
) -> None:
    path = ring_path(tmp_path, "a")
    path.unlink()
    path.mkdir() if kind == "folder" else path.write_text("mine")
    until_s = time.monotonic() + 5
    while not path.is_socket() and time.monotonic() < until_s:
        mesh.look()
        if kind == "folder" and path.is_dir() and time.monotonic() > until_s - 3:
            path.rmdir()
    assert path.is_socket()


def test_what_is_no_socket_is_nobodys_that_was_killed(tmp_path: Path, kernels: NativeKernels) -> None:
    (tmp_path / "wedding-rings").write_text("gold")
    (tmp_path / "old-rings").mkdir()
    server = RingServer(tmp_path, "next", 1, kernels, LOG)
    assert ring_path(tmp_path, "next").is_socket()
    assert {path.name for path in tmp_path.iterdir()} == {"wedding-rings", "old-rings", "next-rings"}
    server.close()
    assert {path.name for path in tmp_path.iterdir()} == {"wedding-rings", "old-rings"}


def test_a_folder_that_comes_later_is_listened_in_then(tmp_path: Path, kernels: NativeKernels) -> None:
    now_s = 0.0
    server = RingServer(tmp_path / "later", "a", 1, kernels, LOG, clock=lambda: now_s)
    (tmp_path / "later").mkdir()
    now_s += 10
    server.look(None)
    assert ring_path(tmp_path / "later", "a").is_socket()
    server.close()


def test_a_node_without_a_descriptor_left_takes_rings_in_later(mesh: RingMesh) -> None:
    with mock.patch.object(mesh.servers["a"], "_listener") as listener:
        listener.accept.side_effect = OSError(errno.EMFILE, "Too many open files")
        mesh.look()
    call = mesh.call(3)
    mesh.start(call)
    done = mesh.finish()
    assert isinstance(done, CallDone)
    assert torch.equal(done.answer, mesh.wanted(call))


def test_a_stage_without_a_descriptor_left_goes_on_in_messages(mesh: RingMesh) -> None:
    mesh.rings.peers.give_up(mesh.number("a"), 0.0)
    with mock.patch("services.stage.experts.peers.socket.socket", side_effect=OSError(errno.EMFILE, "Too many")):
        mesh.client._next_rings_s = 0.0
        mesh.client.poll(time.monotonic() + 100)
    mesh.start(mesh.call(3))
    assert any(isinstance(message, Dispatch) for sent in mesh.socket_messages().values() for message in sent)


def test_what_was_damaged_in_a_ring_is_asked_of_the_same_node_in_a_message_at_once(
    tmp_path: Path, kernels: NativeKernels
) -> None:
    mesh = RingMesh(tmp_path, kernels, {"a": ALL}, idle=["a"])
    try:
        mesh.open_rings()
        mesh.start(mesh.call(4))
        mesh.slot("a").spoil_rows()
        mesh.wake("a")
        until_s = time.monotonic() + 5
        while mesh.slot("a").state != ANSWERED and time.monotonic() < until_s:
            time.sleep(0.001)
        mesh.poll()
        assert isinstance(mesh.socket_messages()["a"][0], Dispatch), "in the very turn in which it was noticed"
    finally:
        mesh.close()
