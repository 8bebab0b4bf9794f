"""Peers of a link that ask too much, never read, or say what nobody has asked for: others are served meanwhile, and no
memory grows with them."""

from __future__ import annotations

import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import zmq

from common.compute.native_library import NativeKernels
from common.wire.call_ring import MAX_LINK_FRAME_BYTES, SLOTS, Outcome, ring_shape
from common.wire.zmq_functions import MAX_QUEUED_CALLS
from services.stage.experts.client import CallDone
from services.stage.experts.peers import FLOOD
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.ring_nodes import ALL, RingMesh, await_message, kernels
from tests.unit.stage.experts.test_links import HEAD, ask, await_open, question_of

__all__ = ["kernels", "one_torch_thread"]
MIB = 1 << 20
Askers = Callable[..., zmq.Socket[bytes]]


@pytest.fixture
def mesh(tmp_path: Path, kernels: NativeKernels) -> Iterator[RingMesh]:
    """A stage that has one node, over a link."""
    made = RingMesh(tmp_path, kernels, {"a": ALL}, linked=("a",))
    made.open_rings()
    yield made
    made.close()


@pytest.fixture
def idle(tmp_path: Path, kernels: NativeKernels) -> Iterator[RingMesh]:
    """The same, but the node is stopped."""
    made = RingMesh(tmp_path, kernels, {"a": ALL}, linked=("a",), idle=("a",))
    made.open_rings()
    yield made
    made.close()


@pytest.fixture
def askers() -> Iterator[Askers]:
    """Makes sockets that stand for other stages, and say what they like."""
    with ExitStack() as closing:

        def make(mesh: RingMesh, receive_high_water_mark: int = 100_000) -> zmq.Socket[bytes]:
            asker = mesh.real.context.socket(zmq.DEALER)
            closing.callback(asker.close, linger=0)
            asker.setsockopt(zmq.RCVHWM, receive_high_water_mark)
            asker.setsockopt(zmq.SNDHWM, 0)
            asker.connect(mesh.links["a"].endpoints[0])
            return asker

        yield make


def is_answered(mesh: RingMesh, seed: int = 0) -> bool:
    """Whether a call of the stage is answered over its link, with the right bits."""
    call = mesh.call(3, seed=seed)
    mesh.start(call)
    done = mesh.finish()
    assert isinstance(done, CallDone)
    assert torch.equal(done.answer, mesh.wanted(call))
    return not any(mesh.socket_messages().values())


def outcomes(asker: zmq.Socket[bytes], count: int) -> Counter[Outcome]:
    """Of so many answers."""
    found: Counter[Outcome] = Counter()
    for _ in range(count):
        assert asker.poll(5000), f"{found.total()} answers have come"
        found[Outcome(HEAD.unpack_from(asker.recv())[1])] += 1
    return found


def test_no_frame_of_a_link_is_larger_than_a_socket_of_a_link_takes() -> None:
    for width in (8, 64, 768, 2048, 4096, 7168, 20_000):
        for value_bytes in (2, 4):
            for pairs_per_token in (1, 2, 8, 16):
                shape = ring_shape(width, value_bytes, pairs_per_token)
                row_bytes = width * value_bytes
                question = HEAD.size + shape.max_pairs * 8 + shape.max_rows * row_bytes
                assert max(question, HEAD.size + shape.max_pairs * row_bytes) <= MAX_LINK_FRAME_BYTES


def test_a_stage_that_asks_more_than_it_has_slots_is_refused_the_rest_at_once(idle: RingMesh, askers: Askers) -> None:
    question, asker = question_of(idle), askers(idle)
    idle.client.abandon()
    for _ in range(SLOTS + 9):
        asker.send(question)
    time.sleep(0.2)  # all of it has arrived
    idle.wake("a")
    assert outcomes(asker, SLOTS + 9) == {Outcome.GIVEN: SLOTS, Outcome.OUT_OF_TIME: 9}


def test_many_stages_that_ask_at_a_time_are_all_answered(idle: RingMesh, askers: Askers) -> None:
    question = question_of(idle)
    crowd = [askers(idle) for _ in range(100)]
    for asker in crowd:
        for _ in range(SLOTS):
            asker.send(question)
    time.sleep(0.2)
    idle.wake("a")
    assert all(outcomes(asker, SLOTS) == {Outcome.GIVEN: SLOTS} for asker in crowd)


def test_calls_whose_answers_would_be_too_much_at_a_time_are_all_answered(idle: RingMesh, askers: Askers) -> None:
    asked = ask(idle, 256)
    question = idle.links["a"].raw.recv_multipart()[1]
    crowd = [askers(idle) for _ in range(200)]
    assert len(crowd) * SLOTS * len(asked.pairs) * 48 * 4 > 64 * MIB, "native/call_server.h: MAX_BATCH_BYTES"
    for asker in crowd:
        for _ in range(SLOTS):
            asker.send(question)
    time.sleep(0.5)
    idle.wake("a")
    assert all(outcomes(asker, SLOTS) == {Outcome.GIVEN: SLOTS} for asker in crowd)


def test_a_flood_of_calls_costs_others_no_answer(mesh: RingMesh, idle: RingMesh, askers: Askers) -> None:
    question, asker = question_of(idle), askers(mesh)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(20):
        for _ in range(1000):
            asker.send(question)
        assert is_answered(mesh, seed)
    found = {HEAD.unpack_from(asker.recv())[1] for _ in iter(lambda: asker.poll(200), 0)}
    assert found == {Outcome.GIVEN, Outcome.OUT_OF_TIME}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200 * 1024


def test_a_flood_of_parts_and_of_nonsense_costs_others_no_answer(mesh: RingMesh, askers: Askers) -> None:
    asker = askers(mesh)
    for seed in range(20):
        asker.send_multipart([b"", *[b"x" * 100] * 20_000])
        for _ in range(1000):
            asker.send(b"y" * 300)
        assert is_answered(mesh, seed)
    assert mesh.servers["a"].counts().refused > 1000


def test_a_stage_that_never_reads_is_owed_no_more_than_its_share_and_others_are_answered(
    mesh: RingMesh, idle: RingMesh, askers: Askers
) -> None:
    asked = ask(idle, 200)
    question = idle.links["a"].raw.recv_multipart()[1]
    answer_bytes = HEAD.size + len(asked.pairs) * 48 * 4
    asker = askers(mesh, receive_high_water_mark=1)
    num_sent = 0
    for seed in range(200):
        for _ in range(SLOTS):
            asker.send(question)
            num_sent += 1
        assert is_answered(mesh, seed)
    assert mesh.servers["a"].counts().steps >= num_sent, "all were computed, as far as anybody knows"
    kept = 0
    while asker.poll(300):
        asker.recv()
        kept += 1
    in_kernels = 16 * MIB // answer_bytes
    assert kept <= MAX_QUEUED_CALLS + in_kernels < num_sent / 2


def test_many_connections_that_say_nothing_or_nonsense_cost_others_no_answer(mesh: RingMesh) -> None:
    host, _, port = mesh.links["a"].endpoints[0].removeprefix("tcp://").rpartition(":")
    with ExitStack() as closing:
        for number in range(150):
            strange = closing.enter_context(socket.create_connection((host, int(port))))
            strange.send((b"", b"\xff" + bytes(8), b"GET / HTTP/1.1\r\n\r\n")[number % 3])
        assert all(is_answered(mesh, seed) for seed in range(20))


def test_a_frame_that_is_too_large_is_not_taken_and_others_are_answered(mesh: RingMesh, askers: Askers) -> None:
    asker = askers(mesh)
    asker.send(bytes(MAX_LINK_FRAME_BYTES + 1))
    asker.send(bytes(64))
    assert not asker.poll(200)
    assert is_answered(mesh)


def test_a_stage_whose_node_answers_with_too_large_a_frame_gives_the_link_up(idle: RingMesh) -> None:
    idle.start(idle.call(8))
    sender, _ = idle.links["a"].raw.recv_multipart()
    idle.links["a"].raw.send_multipart([sender, bytes(MAX_LINK_FRAME_BYTES + 1)])
    assert await_message(idle, "a") is not None


@pytest.mark.parametrize("size", [10, HEAD.size, 3000])
def test_a_stage_that_is_flooded_with_answers_gives_the_link_up_and_asks_in_messages(idle: RingMesh, size: int) -> None:
    idle.start(idle.call(8))
    sender, _ = idle.links["a"].raw.recv_multipart()
    for _ in range(2 * FLOOD):
        idle.links["a"].raw.send_multipart([sender, bytes(size)])
    began_s = time.monotonic()
    assert await_message(idle, "a") is not None
    assert time.monotonic() - began_s < 1.0
    assert idle.client.counters.late_answers >= FLOOD
    await_open(idle, 1)


def test_late_answers_alone_do_not_cost_a_link(mesh: RingMesh) -> None:
    for seed in range(30):
        mesh.start(mesh.call(8, seed=seed))
        mesh.client.abandon()
        mesh.poll()
        mesh.socket_messages()
    until_s = time.monotonic() + 5
    while any(mesh.slot("a", index).state for index in range(SLOTS)) and time.monotonic() < until_s:
        mesh.poll()
    assert mesh.rings.peers.num_open == 1
    assert is_answered(mesh)
