"""Which mirror this stage feeds, if any, and beginning anew when one does not keep up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import torch
import zmq
from torch import Tensor

from common.compute.device_errors import raise_if_device_failed
from common.errors import LIFE_ENDING_ERRORS, ConfigurationError, SocketError
from common.messages import Header, MirrorAck, MirrorTo
from common.wire.endpoints import choose_endpoint
from common.wire.transport import LinkEvent, Transport
from services.stage.slot.mirror_sender import MirrorSender
from services.stage.slot.slot import HeldMemory

RESTART_DELAY_S = 1.0


class MirrorLink:
    """At most one mirror at a time. The owner calls `pump` in each round of its loop."""

    def __init__(self, transport: Transport, ipc_token: str, log: structlog.stdlib.BoundLogger) -> None:
        self._transport = transport
        self._ipc_token = ipc_token
        self._log = log
        self._attempts = itertools.count(1)
        self._wanted: tuple[MirrorTo, int] | None = None
        """And the router's term in which it was asked for."""
        self.feed_number = 0
        """Of the message that is obeyed; 0: nobody is fed."""
        self._newest_number = 0
        self._sender: MirrorSender | None = None
        self._restart_at_s: float | None = None
        self._bytes_to_former_mirrors = 0

    @property
    def bytes_sent(self) -> int:
        """To all mirrors since start."""
        current = self._sender.socket.bytes_sent if self._sender is not None else 0
        return self._bytes_to_former_mirrors + current

    @property
    def wants_to_send(self) -> bool:
        """Whether a back-fill is under way."""
        return self._sender is not None and self._sender.wants_to_send

    def poll_sockets(self) -> list[zmq.Socket[bytes]]:
        """That tell when the mirror is connected."""
        monitor = self._sender.socket.monitor if self._sender is not None else None
        return [monitor] if monitor is not None else []

    def obey(self, wanted: MirrorTo, header: Header) -> bool:
        """Feed this node, from the beginning, or nobody. True if sockets have changed: what is obeyed already, or came
        later than what replaced it, changes nothing. Raises ConfigurationError for an address that is none."""
        number = header.generation
        if number < self._newest_number or (number == self.feed_number and self._wanted is not None):
            return False
        self.stop()
        self._newest_number = number
        if wanted.endpoints:
            self._wanted, self.feed_number = (wanted, header.router_term), number
            if not self._connect(*self._wanted):
                self._restart_at_s = 0.0
        return True

    def stop(self) -> None:
        """Feed nobody any more."""
        self._wanted, self._restart_at_s, self.feed_number = None, None, 0
        self._close_sender()

    def acknowledged(self, message: MirrorAck, header: Header) -> None:
        """The mirror has applied what was sent. Of an attempt before this one, it says nothing of what is sent now."""
        sender = self._sender
        if sender is not None and (message.lease_term, header.attempt) == (sender.lease_term, sender.attempt):
            sender.acknowledged(message.applied)

    def send_rows(self, held: HeldMemory, positions: Tensor) -> None:
        """What a step has written."""
        if self._sender is not None:
            with self._at_its_own_cost(self._sender), torch.inference_mode():
                self._sender.send_rows(held.memory, positions, held.marks.mark)

    def pump(self, held: HeldMemory, now_s: float) -> bool:
        """Take link events, go on with the back-fill, begin anew when it is time. True if sockets have changed."""
        if self._restart_at_s is not None and self._wanted is not None and now_s >= self._restart_at_s:
            self._restart_at_s = None
            if not self._connect(*self._wanted):
                self._restart_at_s = now_s + RESTART_DELAY_S
            return True
        sender = self._sender
        if sender is None:
            return False
        for event in sender.socket.link_events():
            if event is LinkEvent.CONNECTED and not sender.connected:
                sender.begin(held.tables.used_blocks())
            elif event is LinkEvent.CLOSED:
                sender.is_broken = True
        sender.look(now_s)
        if sender.wants_to_send:
            with self._at_its_own_cost(sender), torch.inference_mode():
                sender.send_blocks(held.memory, held.marks.mark)
        if sender.is_broken:
            self._log.warning("mirror_lags", lease_term=sender.lease_term)
            self._close_sender()
            self._restart_at_s = now_s + RESTART_DELAY_S
            return True
        return False

    @contextmanager
    def _at_its_own_cost(self, sender: MirrorSender) -> Iterator[None]:
        """What cannot be copied is missing in the mirror, whatever the next mark says: its stream ends, and begins anew
        a moment later. The step is on its way, and the stage has others."""
        try:
            yield
        except LIFE_ENDING_ERRORS:
            raise
        except Exception as error:
            raise_if_device_failed(error)
            self._log.error("mirror_not_fed", lease_term=sender.lease_term, reason=str(error))
            sender.is_broken = True

    def _connect(self, wanted: MirrorTo, router_term: int) -> bool:
        """False where there is no socket for it now."""
        try:
            endpoint = choose_endpoint(wanted.endpoints, wanted.ipc_token, self._ipc_token)
            socket = self._transport.push(f"mirror {wanted.node_id}", endpoint)
        except ConfigurationError as error:
            self._log.error("mirror_unreachable", node=wanted.node_id, reason=str(error))
            return True
        except SocketError as error:
            self._log.error("mirror_without_socket", node=wanted.node_id, reason=str(error))
            return False
        self._sender = MirrorSender(socket, router_term, wanted.lease_term, next(self._attempts))
        return True

    def _close_sender(self) -> None:
        if self._sender is not None:
            self._bytes_to_former_mirrors += self._sender.socket.bytes_sent
            self._sender.close()
            self._sender = None
