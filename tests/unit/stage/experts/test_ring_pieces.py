"""Calls that are larger than a slot of a ring: their pieces, as slots come free, and what becomes of them when a piece
is late, damaged, lost or not wanted any more."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.compute.native_library import NativeKernels
from common.messages import Dispatch, Header
from common.wire.array import frame_to_array
from common.wire.call_ring import SLOTS
from common.wire.transport import LinkEvent
from services.stage.experts.client import CallDone
from services.stage.experts.hedging import CEILING_S
from services.stage.experts.rings import RingCall
from tests.support.nodes.kernels import kernels_for, one_torch_thread
from tests.support.nodes.ring_nodes import ALL, CHOICES, RingMesh, idle, kernels, mesh

__all__ = ["idle", "kernels", "mesh", "one_torch_thread"]
FREE, ASKED, TAKEN, ANSWERED, UNWANTED = range(5)
"""States of a slot: native/call_ring.h."""
ROWS = 4
"""Of a slot here."""
LATE_S = 0.5
AT_A_TIME = 2
"""Pieces of a call in one ring: native/call_client.h."""


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.wire.call_ring.MAX_ROWS", ROWS)


def states(mesh: RingMesh, name: str) -> list[int]:
    return [mesh.slot(name, index).state for index in range(SLOTS)]


def ask(mesh: RingMesh, num_tokens: int, seed: int = 0) -> RingCall:
    now_s = time.monotonic()
    asked = mesh.rings.ask(1, mesh.call(num_tokens, seed=seed), Header(), now_s, now_s + 10)
    assert asked is not None
    return asked


def messages(mesh: RingMesh, within_s: float = 5.0) -> dict[str, list[Dispatch]]:
    """What has gone as messages once something has, by node."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        mesh.poll()
        sent = {name: [m for m in some if isinstance(m, Dispatch)] for name, some in mesh.socket_messages().items()}
        if any(sent.values()):
            return sent
    return {}


def num_pairs(sent: dict[str, list[Dispatch]]) -> int:
    all_sent = [message for some in sent.values() for message in some]
    return sum(frame_to_array(message.routing, "int32", (3, None), "routing").shape[1] for message in all_sent)


@settings(deadline=None, max_examples=60)
@given(num_tokens=st.integers(1, 40), num_slices=st.integers(1, 3), seed=st.integers(0, 99), owners=st.data())
def test_each_pair_of_a_call_is_in_one_piece_that_a_slot_has_room_for_and_of_a_node_that_holds_it(
    num_tokens: int, num_slices: int, seed: int, owners: st.DataObject
) -> None:
    native = kernels_for("native")
    assert native is not None
    held = {"a": tuple(sorted(owners.draw(st.sets(st.sampled_from(ALL), min_size=1)))), "b": ALL}
    with TemporaryDirectory() as folder:
        mesh = RingMesh(Path(folder), native, held, num_slices=num_slices, idle=["a", "b"])
        try:
            mesh.open_rings()
            asked = ask(mesh, num_tokens, seed)
            parts = asked.parts()
            assert sorted(np.concatenate([part.rows.pairs for part in parts])) == list(
                range(num_tokens * CHOICES * num_slices)
            )
            names = {mesh.number(name): name for name in held}
            for part in parts:
                assert part.rows.tokens.size <= ROWS
                assert np.ptp(part.rows.tokens) < ROWS, "tokens that follow each other"
                assert set(part.rows.routing[1].tolist()) <= set(held[names[part.rows.node]])
                keys = part.rows.routing[1] * num_slices + part.rows.routing[2]
                assert (np.diff(keys) >= 0).all()
        finally:
            mesh.close()


def test_a_call_of_many_pieces_leaves_slots_to_others(idle: RingMesh) -> None:
    for num_tokens, num_asked in ((9 * ROWS + 1, 2), (3 * ROWS, 3), (ROWS, 4)):
        ask(idle, num_tokens)
        assert [states(idle, name).count(ASKED) for name in ("a", "b")] == [num_asked] * 2


def test_pieces_of_several_calls_at_a_time_are_not_mixed_up(mesh: RingMesh) -> None:
    all_asked = [ask(mesh, num_tokens, seed) for seed, num_tokens in enumerate((9 * ROWS + 1, 3 * ROWS))]
    until_s = time.monotonic() + 10
    while not all([mesh.rings.take_in(asked) for asked in all_asked]) and time.monotonic() < until_s:
        time.sleep(0.001)
    for asked in all_asked:
        assert asked.is_given
        assert torch.equal(mesh.rings.total(asked), mesh.wanted(asked.call))


def test_a_large_call_that_is_waited_for_goes_on_by_itself(mesh: RingMesh) -> None:
    asked = ask(mesh, 30 * ROWS)
    assert mesh.rings.take_in(asked, timeout_s=5.0)
    assert torch.equal(mesh.rings.total(asked), mesh.wanted(asked.call))


def test_what_of_a_late_call_was_not_asked_goes_as_messages_and_what_was_stays_where_it_is(
    tmp_path: Path, kernels: NativeKernels
) -> None:
    mesh = RingMesh(tmp_path, kernels, {"a": ALL}, idle=["a"])
    try:
        mesh.open_rings()
        call = mesh.call(8 * ROWS)
        mesh.start(call)
        assert num_pairs(messages(mesh)) == call.experts.numel() * (8 - AT_A_TIME) // 8
        assert states(mesh, "a").count(ASKED) == AT_A_TIME
        (node,) = mesh.client.nodes
        assert node.outstanding_rows == call.experts.numel()
        mesh.client.abandon()
        assert node.outstanding_rows == 0
    finally:
        mesh.close()


def test_a_large_call_is_not_late_while_its_pieces_come(idle: RingMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.stage.experts.hedging.CEILING_S", LATE_S)
    call = idle.call(40 * ROWS)
    idle.start(call)
    idle.wake("a", "b")  # they look every 50 ms
    began_s = time.monotonic()
    done = idle.finish(within_s=30)
    assert time.monotonic() - began_s > LATE_S
    assert isinstance(done, CallDone)
    assert torch.equal(done.answer, idle.wanted(call))
    assert not any(idle.socket_messages().values())


def test_a_call_of_one_piece_is_late_by_when_it_began(idle: RingMesh) -> None:
    asked = ask(idle, ROWS)
    idle.rings.take_in(asked, 0.01)
    assert asked.asked_s == asked.started_s


def test_nothing_is_written_into_a_ring_for_a_call_that_has_become_late(idle: RingMesh) -> None:
    idle.start(idle.call(8 * ROWS))
    assert messages(idle)
    idle.wake("a", "b")
    until_s = time.monotonic() + 2 * CEILING_S
    while time.monotonic() < until_s:
        idle.poll()
    assert sum(server.counts().steps for server in idle.servers.values()) == 2 * AT_A_TIME


def test_a_call_that_is_abandoned_frees_its_slots_and_is_asked_no_further(idle: RingMesh) -> None:
    idle.start(idle.call(8 * ROWS))
    idle.slot("a").take()
    idle.client.abandon()
    assert states(idle, "a") == [UNWANTED, *[FREE] * (SLOTS - 1)]
    assert states(idle, "b") == [FREE] * SLOTS
    idle.poll()
    assert states(idle, "b") == [FREE] * SLOTS
    assert not any(isinstance(message, Dispatch) for sent in idle.socket_messages().values() for message in sent)


@pytest.mark.parametrize("is_given_up", [False, True])
def test_nothing_is_written_for_a_call_of_which_a_ring_was_given_up(idle: RingMesh, is_given_up: bool) -> None:
    asked = ask(idle, 8 * ROWS)
    num_unasked = asked.num_unasked
    for part in asked.parts()[: 2 * AT_A_TIME]:
        idle.rings.take_back(asked, part.index)
    if is_given_up:
        idle.rings.peers.give_up(idle.number("a"), time.monotonic())
    assert not idle.rings.take_in(asked)
    assert (asked.num_unasked == num_unasked) == is_given_up
    assert (states(idle, "b") == [FREE] * SLOTS) == is_given_up


def test_a_piece_that_was_damaged_is_asked_again_alone(idle: RingMesh) -> None:
    idle.start(idle.call(AT_A_TIME * ROWS))
    parts = [part.rows for asked in idle.client._in_rings.values() for part in asked.parts()]
    idle.slot("a", 1).spoil_rows()
    idle.wake("a", "b")
    damaged = [rows for rows in parts if rows.node == idle.number("a")][1]
    assert num_pairs(messages(idle)) == damaged.pairs.size


def test_a_node_that_is_lost_loses_its_pieces_and_those_that_it_was_not_asked_for(idle: RingMesh) -> None:
    call = idle.call(8 * ROWS)
    idle.start(call)
    parts = [part.rows for asked in idle.client._in_rings.values() for part in asked.parts()]
    kept = [rows for rows in parts if rows.node == idle.number("b")][:AT_A_TIME]
    idle.socket("a").events.append(LinkEvent.CLOSED)
    sent = messages(idle)
    assert not sent["a"]
    assert num_pairs(sent) == call.experts.numel() - sum(rows.pairs.size for rows in kept)


def test_a_large_call_while_one_node_has_no_slot_goes_as_messages(idle: RingMesh) -> None:
    for index in range(SLOTS):
        idle.slot("b", index).set_state(TAKEN)
    call = idle.call(3 * ROWS)
    idle.start(call)
    assert states(idle, "a") == [FREE] * SLOTS
    assert num_pairs(messages(idle)) == call.experts.numel()
