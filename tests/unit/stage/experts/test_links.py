"""Calls over ZeroMQ from native code to native code: the same bits as by messages and through rings; whatever comes
over a link that makes no sense, or does not come, costs no call."""

from __future__ import annotations

import gc
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.compute.native_library import NativeKernels
from common.errors import ConfigurationError
from common.messages import Dispatch, Header
from common.wire.call_ring import SLOTS, Outcome
from common.wire.transport import RoutingSocket
from services.stage.experts.client import CallDone
from services.stage.experts.rings import FULL_S, RingCall
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.ring_nodes import ALL, RingMesh, await_message, kernels

__all__ = ["kernels", "one_torch_thread"]
FREE, ASKED, _, _, UNWANTED = range(5)
"""States of a slot: native/call_ring.h."""
HEAD = struct.Struct("<IIqqqqqQQ")
"""State, outcome, number, layer, time left, rows, pairs, checksum of what is asked, and of the answer."""
UNCHECKED = (*range(8), *range(56, 64))
"""The bytes of a question's head that say nothing in it."""

Meshes = Callable[..., RingMesh]


@pytest.fixture
def meshes(tmp_path: Path, kernels: NativeKernels) -> Iterator[Meshes]:
    """Makes meshes whose nodes are reached by links, if not said otherwise."""
    made: list[RingMesh] = []

    def make(holdings: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, **more: object) -> RingMesh:
        mesh = RingMesh(tmp_path, kernels, holdings, dtype, **{"linked": tuple(holdings), **more})  # type: ignore[arg-type]
        made.append(mesh)
        mesh.open_rings()
        return mesh

    yield make
    for mesh in made:
        mesh.close()


@pytest.fixture
def mesh(meshes: Meshes) -> RingMesh:
    """Two nodes that hold everything."""
    return meshes({"a": ALL, "b": ALL})


@pytest.fixture
def idle(meshes: Meshes) -> RingMesh:
    """The same, but they are stopped."""
    return meshes({"a": ALL, "b": ALL}, idle=("a", "b"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_slices", [1, 2])
@pytest.mark.parametrize("linked", [("a", "b"), ("b",)])
def test_an_answer_over_links_has_the_bits_of_one_node_alone_and_nothing_goes_as_a_message(
    meshes: Meshes,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num_slices: int,
    linked: tuple[str, ...],
) -> None:
    monkeypatch.setattr("common.wire.call_ring.MAX_ROWS", 8)
    mesh = meshes({"a": (0, 1, 2, 3), "b": (2, 3, 4, 5)}, dtype, num_slices=num_slices, linked=linked)
    for seed, num_tokens in enumerate((1, 2, 3, 7, 8, 9, 43)):
        call = mesh.call(num_tokens, layer=seed % 2, seed=seed)
        mesh.start(call)
        done = mesh.finish()
        assert isinstance(done, CallDone)
        assert torch.equal(done.answer, mesh.wanted(call))
    assert not any(mesh.socket_messages().values())
    assert all(server.counts().steps for server in mesh.servers.values())


def test_askers_that_share_a_node_get_their_own_rows(meshes: Meshes) -> None:
    stopped, mesh = meshes({"a": ALL}, idle=("a",)), meshes({"a": ALL})
    question, expected = question_of(stopped), None
    asker = mesh.real.context.socket(zmq.DEALER)
    asker.connect(mesh.links["a"].endpoints[0])
    for seed in range(20):
        asker.send(question)
        call = mesh.call(3, seed=seed)
        mesh.start(call)
        done = mesh.finish()
        assert isinstance(done, CallDone)
        assert torch.equal(done.answer, mesh.wanted(call))
        answer = asker.recv()
        assert answer == (expected or answer)
        expected = answer
    asker.close(linger=0)


def test_a_call_that_is_given_up_before_it_was_begun_is_not_computed_and_frees_its_slot(idle: RingMesh) -> None:
    idle.start(idle.call(8))
    idle.client.abandon()
    assert idle.slot("a").state == UNWANTED, "the node still has it"
    assert {node.outstanding_rows for node in idle.client.nodes} == {0}
    time.sleep(0.05)  # what was sent has arrived
    idle.wake("a", "b")
    await_state(idle, "a", FREE)
    assert idle.servers["a"].counts().rows == 0


def test_a_call_that_is_late_is_hedged_by_a_message_and_its_late_answer_frees_its_slot(meshes: Meshes) -> None:
    mesh = meshes({"a": ALL, "b": ALL}, idle=("a",))
    mesh.start(mesh.call(8))
    assert isinstance(await_message(mesh, "b"), Dispatch)
    sender, question = mesh.links["a"].raw.recv_multipart()
    mesh.client.abandon()
    assert mesh.slot("a").state == UNWANTED
    mesh.links["a"].raw.send_multipart([sender, answer_to(question, Outcome.OUT_OF_TIME)])
    await_state(mesh, "a", FREE)


def test_a_link_whose_slots_stay_taken_is_given_up_and_a_new_one_is_free(mesh: RingMesh) -> None:
    for index in range(SLOTS):
        mesh.slot("a", index).set_state(UNWANTED)
    since_s = time.monotonic()
    for later_s in (0.0, 0.4, 0.8, 1.2, 1.6, FULL_S):
        assert mesh.rings.ask(1, mesh.call(8), Header(), since_s + later_s, since_s + 10) is None
    await_open(mesh, 2)
    mesh.start(mesh.call(8))
    assert isinstance(mesh.finish(), CallDone)
    assert not any(mesh.socket_messages().values())


def test_a_call_whose_link_breaks_goes_on_in_messages_at_once(idle: RingMesh) -> None:
    idle.start(idle.call(8))
    idle.links["a"].close()
    began_s = time.monotonic()
    assert isinstance(await_message(idle, "b"), Dispatch)
    assert time.monotonic() - began_s < 1.0, "no answer is waited for"
    del idle.links["a"]


def test_another_life_of_a_node_at_the_same_address_does_not_answer_what_was_meant_for_the_one_before(
    mesh: RingMesh,
) -> None:
    (endpoint,) = mesh.links["a"].endpoints
    mesh.servers["a"].close()
    mesh.links["a"].close()
    mesh.links["a"] = listening_again(mesh, endpoint)
    mesh.servers["a"] = mesh.server("a", incarnation=99)
    await_open(mesh, 1)
    await_open(mesh, 2)
    mesh.start(mesh.call(8))
    assert isinstance(await_message(mesh, "a", "b"), Dispatch)
    assert mesh.servers["a"].counts().rows == 0


def test_a_node_that_cuts_its_experts_anew_refuses_what_is_cut_otherwise(mesh: RingMesh) -> None:
    mesh.servers["a"].close()
    store = mesh.stores["a"]
    store.num_slices = 2
    mesh.servers["a"] = mesh.server("a", incarnation=1)
    mesh.start(mesh.call(8))
    assert isinstance(await_message(mesh, "a", "b"), Dispatch)
    assert mesh.servers["a"].counts().rows == 0


def test_a_node_that_nobody_is_at_home_at_is_asked_in_messages(tmp_path: Path, kernels: NativeKernels) -> None:
    mesh = RingMesh(tmp_path, kernels, {"a": ALL}, linked=("a",))
    try:
        mesh.links["a"].close()
        mesh.start(mesh.call(1))
        mesh.client.abandon()
        mesh.socket_messages()
        for _ in range(20):
            mesh.poll()
        assert mesh.rings.peers.num_open == 0
        mesh.start(mesh.call(4))
        assert isinstance(await_message(mesh, "a"), Dispatch)
    finally:
        mesh.close()


def test_a_node_answers_others_after_a_stage_has_gone_in_the_middle_of_a_call(mesh: RingMesh) -> None:
    for _ in range(5):
        mesh.start(mesh.call(8))
        mesh.client.abandon()
        for number in list(mesh.rings.peers._peers):
            mesh.rings.peers.give_up(number, -10.0)
        await_open(mesh, 2)
    call = mesh.call(8)
    mesh.start(call)
    done = mesh.finish()
    assert isinstance(done, CallDone)
    assert torch.equal(done.answer, mesh.wanted(call))


def test_a_stage_and_a_node_give_back_every_descriptor(tmp_path: Path, kernels: NativeKernels) -> None:
    gc.collect()  # what former tests have let go
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        mesh = RingMesh(tmp_path, kernels, {"a": ALL, "b": ALL}, linked=("a", "b"))
        mesh.open_rings()
        mesh.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_stage_that_has_heard_what_came_is_not_woken_by_it_again(mesh: RingMesh) -> None:
    mesh.start(mesh.call(8))
    mesh.client.abandon()
    until_s = time.monotonic() + 5
    while {mesh.slot(name).state for name in ("a", "b")} != {FREE} and time.monotonic() < until_s:
        mesh.poll()
    assert not any(int(raw.get(zmq.EVENTS)) & zmq.POLLIN for raw in mesh.rings.poll_sockets())


def test_a_frame_that_is_damaged_is_refused_by_a_node_and_the_next_one_is_answered(meshes: Meshes) -> None:
    stopped, mesh = meshes({"a": ALL}, idle=("a",)), meshes({"a": ALL})
    question = question_of(stopped)
    asker = mesh.real.context.socket(zmq.DEALER)
    asker.connect(mesh.links["a"].endpoints[0])
    asker.send(question)
    expected = asker.recv()
    assert HEAD.unpack_from(expected)[1] == Outcome.GIVEN
    counted = mesh.servers["a"].counts().rows

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(parts=st.lists(damaged(question), min_size=1, max_size=3))
    def check(parts: list[bytes]) -> None:
        nonlocal counted
        asker.send_multipart(parts)
        asker.send(question)
        while (answer := asker.recv()) != expected:
            assert HEAD.unpack_from(answer)[1] in (Outcome.MALFORMED, Outcome.DAMAGED)
        counted += 8 * 2
        assert mesh.servers["a"].counts().rows in (counted, counted - 16), "the last one is counted after its answer"

    check()
    asker.close(linger=0)


def test_an_answer_that_is_damaged_is_not_used_and_the_slot_is_free_again(meshes: Meshes) -> None:
    stopped, mesh = meshes({"a": ALL}, idle=("a",)), meshes({"a": ALL})
    asker = mesh.real.context.socket(zmq.DEALER)
    asker.connect(mesh.links["a"].endpoints[0])
    raw = stopped.links["a"].raw

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        asked = ask(stopped, 8)
        sender, question = raw.recv_multipart()
        asker.send(question)
        answer = asker.recv()
        raw.send_multipart([sender, data.draw(damaged(answer, unchecked=UNCHECKED_OF_ANSWER))])
        stopped.rings.take_in(asked, 0.02)
        assert asked.outcome(0) in (None, Outcome.DAMAGED)
        stopped.rings.take_back(asked, 0)
        raw.send_multipart([sender, answer])
        until_s = time.monotonic() + 5
        while stopped.slot("a").state != FREE and time.monotonic() < until_s:
            stopped.rings.hear()
        assert stopped.slot("a").state == FREE
        while raw.poll(20) and HEAD.unpack_from(raw.recv_multipart()[1])[6]:
            raise AssertionError("only a cancel is on its way")

    check()
    asker.close(linger=0)


UNCHECKED_OF_ANSWER = (*range(4), *range(16, 56))
"""The bytes of an answer's head that say nothing in it."""


def damaged(frame: bytes, unchecked: tuple[int, ...] = UNCHECKED) -> st.SearchStrategy[bytes]:
    """Something else than this frame: another bit, another length, another number in the head, or any bytes."""
    places = st.sampled_from([place for place in range(len(frame)) if place not in unchecked])
    words = st.sampled_from([place for place in range(8, 64, 8) if place not in unchecked])
    numbers = st.sampled_from([-(2**63), -1, 0, 1, 2**31, 2**62, 2**63 - 1]) | st.integers(-(2**63), 2**63 - 1)
    other = st.one_of(
        st.tuples(places, st.integers(0, 7)).map(lambda at: changed(frame, at[0], bytes([frame[at[0]] ^ 1 << at[1]]))),
        st.tuples(words, numbers).map(lambda new: changed(frame, new[0], struct.pack("<q", new[1]))),
        st.integers(0, len(frame) - 1).map(lambda length: frame[:length]),
        st.binary(min_size=1, max_size=70).map(lambda more: frame + more),
        st.binary(max_size=200),
    )
    return other.filter(lambda found: found != frame)


def changed(frame: bytes, place: int, new: bytes) -> bytes:
    return frame[:place] + new + frame[place + len(new) :]


def answer_to(question: bytes, outcome: Outcome) -> bytes:
    """A head alone; its checksum is nobody's."""
    return HEAD.pack(0, outcome, HEAD.unpack_from(question)[2], 0, 0, 0, 0, 0, 0)


def ask(mesh: RingMesh, num_tokens: int) -> RingCall:
    now_s = time.monotonic()
    asked = mesh.rings.ask(1, mesh.call(num_tokens), Header(), now_s, now_s + 1000)
    assert asked is not None
    return asked


def question_of(mesh: RingMesh) -> bytes:
    """A frame as a stage sends it, of 8 rows with 2 experts each, in time for long."""
    ask(mesh, 8)
    return mesh.links["a"].raw.recv_multipart()[1]


def listening_again(mesh: RingMesh, endpoint: str) -> RoutingSocket:
    """A socket at an address that another one has just left, which takes a moment."""
    until_s = time.monotonic() + 5
    while True:
        try:
            return mesh.link_socket("a", endpoint)
        except ConfigurationError:
            assert time.monotonic() < until_s
            time.sleep(0.01)


def await_state(mesh: RingMesh, name: str, state: int) -> None:
    until_s = time.monotonic() + 5
    while mesh.slot(name).state != state and time.monotonic() < until_s:
        mesh.poll()
    assert mesh.slot(name).state == state


def await_open(mesh: RingMesh, count: int) -> None:
    until_s = time.monotonic() + 5
    while mesh.rings.peers.num_open != count and time.monotonic() < until_s:
        mesh.poll()
    assert mesh.rings.peers.num_open == count
