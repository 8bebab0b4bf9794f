"""What is left on the way of a back-fill that was given up says nothing of the next one, in either direction."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
import torch

from common.errors import SocketError
from common.messages import Header, MirrorAck, MirrorTo
from common.wire.transport import LinkEvent
from services.stage.model.micro_batch import BlockTables
from services.stage.slot.mirror_receiver import Mirror
from services.stage.slot.mirror_sender import MAX_BACKFILL_AHEAD_MESSAGES, MirrorLink, MirrorSender
from services.stage.slot.step_watermark import StepWatermark
from tests.unit.stage.slot.test_mirror_receiver import ROLE, TERM, Wire, memory

LOG: Any = structlog.get_logger()


def mirror_that_answers(back: Any) -> Mirror:
    return Mirror(ROLE, TERM, memory(), back, LOG)


def sender_to(wire: Wire, attempt: int) -> MirrorSender:
    socket: Any = wire
    sender = MirrorSender(socket, TERM, ROLE.lease_term, attempt)
    sender.begin([0])
    return sender


def test_the_end_of_a_stream_that_was_given_up_is_no_gap_in_the_one_after_it() -> None:
    mirror, old, new = mirror_that_answers(Monitored()), Wire(), Wire()
    for wire, attempt in ((old, 1), (new, 2)):
        sender = sender_to(wire, attempt)
        sender.send_blocks(memory(), 1)
        sender.send_rows(memory(), torch.tensor([3]), 2)
    first_old, late_old = old.waiting
    first_new, second_new = new.waiting
    for arriving in (first_old, first_new):
        assert mirror.follows(*arriving)
        assert mirror.apply(*arriving), "it has become complete"
    assert not mirror.follows(*late_old)
    assert mirror.follows(*second_new)
    assert not mirror.apply(*second_new), "it is still complete"
    assert (mirror.is_spoilt, mirror.is_complete, mirror.mark) == (False, True, 2)


class Monitored(Wire):
    """A socket of a transport: it is connected at once."""

    monitor = None
    bytes_sent = 0

    def __init__(self) -> None:
        super().__init__()
        self.events: list[LinkEvent] = []

    def link_events(self) -> list[LinkEvent]:
        events, self.events = self.events, []
        return events


def test_an_acknowledgement_of_a_stream_that_was_given_up_makes_no_room_in_the_one_after_it() -> None:
    class Transport:
        def push(self, name: str, endpoint: str, *, is_watched: bool = False) -> Wire:
            return Monitored()

    transport: Any = Transport()
    link = MirrorLink(transport, "", LOG)
    wanted = MirrorTo(ROLE.lease_term, "spare", ("tcp://127.0.0.1:1",), "other host")
    for number in (1, 2):
        link.obey(wanted, Header(router_term=TERM, generation=number))
    sender = link._sender
    assert sender is not None
    sender.begin(range(MAX_BACKFILL_AHEAD_MESSAGES * 100))
    paged: Any = SmallMemory()
    while link.wants_to_send:
        sender.send_blocks(paged, 1)
    link.acknowledged(MirrorAck(ROLE.lease_term, MAX_BACKFILL_AHEAD_MESSAGES), Header(attempt=1))
    assert not link.wants_to_send
    link.acknowledged(MirrorAck(ROLE.lease_term, MAX_BACKFILL_AHEAD_MESSAGES), Header(attempt=2))
    assert link.wants_to_send


def test_an_acknowledgement_that_was_lost_with_its_connection_is_said_again_over_the_next_one() -> None:
    """The holder may send no more before it has it."""
    back, wire = Monitored(), Wire()
    mirror = mirror_that_answers(back)
    sender_to(wire, 1).send_blocks(memory(), 1)
    mirror.apply(*wire.waiting.pop())
    assert back.waiting.pop()[0] == MirrorAck(ROLE.lease_term, 1)
    mirror.look()
    assert not back.waiting
    back.events = [LinkEvent.CLOSED, LinkEvent.CONNECTED]
    mirror.look()
    assert back.waiting.pop()[0] == MirrorAck(ROLE.lease_term, 1)


def test_a_mirror_for_which_there_is_no_socket_is_fed_once_there_is_one() -> None:
    class Transport:
        has_sockets = False

        def push(self, name: str, endpoint: str, *, is_watched: bool = False) -> Wire:
            if not self.has_sockets:
                raise SocketError("too many files")
            return Monitored()

    transport: Any = Transport()
    held: Any = None
    link = MirrorLink(transport, "", LOG)
    wanted = MirrorTo(ROLE.lease_term, "spare", ("tcp://127.0.0.1:1",), "other host")
    link.obey(wanted, Header(router_term=TERM, generation=1))
    link.pump(held, 10.0)
    link.pump(held, 10.5)
    transport.has_sockets = True
    link.pump(held, 10.9)
    assert link._sender is None, "not tried again in every turn"
    link.pump(held, 11.1)
    assert link._sender is not None


@pytest.mark.parametrize("what", ["step", "back-fill"])
def test_what_cannot_be_copied_ends_the_stream_before_a_mark_covers_it_and_neither_the_step_nor_the_stage(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wires: list[Wire] = []

    class Transport:
        def push(self, name: str, endpoint: str, *, is_watched: bool = False) -> Wire:
            wires.append(Monitored())
            return wires[-1]

    def fails(places: torch.Tensor) -> Any:
        raise RuntimeError("can't allocate memory")

    transport: Any = Transport()
    held: Any = type("Held", (), {"memory": memory(), "watermark": StepWatermark(5), "tables": BlockTables(32, 4)})
    link = MirrorLink(transport, "", LOG)
    link.obey(MirrorTo(ROLE.lease_term, "spare", ("tcp://127.0.0.1:1",), "other host"), Header(TERM, 1))
    sender = link._sender
    assert sender is not None
    sender.begin([0])
    with monkeypatch.context() as patch:
        patch.setattr(held.memory, "rows", fails)
        if what == "step":
            link.send_rows(held, torch.tensor([3]))
        else:
            link.pump(held, 10.0)
    num_sent = wires[0].num_sent
    sender.send_rows(held.memory, torch.tensor([4]), 6)
    assert wires[0].num_sent == num_sent, "nothing follows, whose mark would cover what is missing"
    link.pump(held, 10.0)
    link.pump(held, 11.1)
    assert len(wires) == 2, "another stream begins"


class SmallMemory:
    """As many blocks as anybody wants, with nothing in them."""

    def rows(self, positions: torch.Tensor) -> Any:
        return type("Rows", (), {name: torch.empty(0) for name in ("keys", "values", "hidden")})
