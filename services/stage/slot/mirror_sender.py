"""The sending side of a mirror: back-fill what is there, then every row that a step writes. In order, bounded.

Whole blocks go a few at a time between steps, so that a late mirror does not stop the stage; a row that is written
meanwhile goes at once, before or after its block: the block is copied as it is when its turn comes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import structlog
import torch
import zmq
from torch import Tensor

from common.compute.device_errors import raise_if_life_ending
from common.errors import ConfigurationError, SocketError
from common.messages import Header, MirrorAck, MirrorRows, MirrorTo
from common.wire.endpoints import choose_endpoint
from common.wire.tensor import tensor_to_frame
from common.wire.transport import Full, LinkEvent, MessageSocket, Transport
from services.stage.model.kv_cache import PagedMemory, positions_of_blocks
from services.stage.model.paged_attention import KV_BLOCK_TOKENS
from services.stage.slot.slot import HeldMemory

RESTART_DELAY_S = 1.0


class MirrorLink:
    """Which mirror this stage feeds, if any, and beginning again with one that did not keep up.

    There is at most one at a time. The owner calls `pump` in each round of its loop.
    """

    def __init__(self, transport: Transport, ipc_token: str, log: structlog.stdlib.BoundLogger) -> None:
        self._transport = transport
        self._ipc_token = ipc_token
        self._log = log
        self._attempts = itertools.count(1)
        self._wanted: tuple[MirrorTo, int] | None = None
        """And the router's term in which it was asked for."""
        self.feed_number = 0
        """The number of the message that is obeyed; 0: no mirror is fed."""
        self._newest_number = 0
        self._sender: MirrorSender | None = None
        self._restart_at_s: float | None = None

    @property
    def wants_to_send(self) -> bool:
        """Returns whether a back-fill is under way."""
        return self._sender is not None and self._sender.wants_to_send

    def poll_sockets(self) -> list[zmq.Socket[bytes]]:
        """Returns those that tell when the mirror is connected."""
        monitor = self._sender.socket.monitor if self._sender is not None else None
        return [monitor] if monitor is not None else []

    def obey(self, wanted: MirrorTo, header: Header) -> None:
        """Feeds the node that is named from the beginning, or stops feeding. A message that is obeyed already, or that
        arrives after the one that replaced it, changes nothing."""
        number = header.generation
        if number < self._newest_number or (number == self.feed_number and self._wanted is not None):
            return
        self.stop()
        self._newest_number = number
        if wanted.endpoints:
            self._wanted, self.feed_number = (wanted, header.router_term), number
            if not self._connect(*self._wanted):
                self._restart_at_s = 0.0

    def stop(self) -> None:
        """Feeds no mirror any more."""
        self._wanted, self._restart_at_s, self.feed_number = None, None, 0
        self._close_sender()

    def acknowledged(self, message: MirrorAck, header: Header) -> None:
        """Notes that the mirror has applied what was sent. Of an attempt before this one, it says nothing of what is
        sent now."""
        sender = self._sender
        if sender is not None and (message.lease_term, header.attempt) == (sender.lease_term, sender.attempt):
            sender.acknowledged(message.applied)

    def send_rows(self, held: HeldMemory, positions: Tensor) -> None:
        """Sends what a step has written."""
        if self._sender is not None:
            with self._at_its_own_cost(self._sender), torch.inference_mode():
                self._sender.send_rows(held.memory, positions, held.watermark.mark)

    def pump(self, held: HeldMemory, now_s: float) -> None:
        """Takes in link events, goes on with the back-fill, begins again when it is time."""
        if self._restart_at_s is not None and self._wanted is not None and now_s >= self._restart_at_s:
            self._restart_at_s = None
            if not self._connect(*self._wanted):
                self._restart_at_s = now_s + RESTART_DELAY_S
            return
        sender = self._sender
        if sender is None:
            return
        for event in sender.socket.link_events():
            if event is LinkEvent.CONNECTED and not sender.connected:
                sender.begin(held.tables.used_blocks())
            elif event is LinkEvent.CLOSED:
                sender.is_broken = True
        sender.look(now_s)
        if sender.wants_to_send:
            with self._at_its_own_cost(sender), torch.inference_mode():
                sender.send_blocks(held.memory, held.watermark.mark)
        if sender.is_broken:
            self._log.warning("mirror_lags", lease_term=sender.lease_term)
            self._close_sender()
            self._restart_at_s = now_s + RESTART_DELAY_S

    @contextmanager
    def _at_its_own_cost(self, sender: MirrorSender) -> Iterator[None]:
        """What cannot be copied is missing in the mirror, whatever the next mark says: its stream ends, and another one
        begins a moment later. The step is on its way, and the stage has others."""
        try:
            yield
        except Exception as error:
            raise_if_life_ending(error)
            self._log.error("mirror_not_fed", lease_term=sender.lease_term, reason=str(error))
            sender.is_broken = True

    def _connect(self, wanted: MirrorTo, router_term: int) -> bool:
        """Returns False where there is no socket for it now."""
        try:
            endpoint = choose_endpoint(wanted.endpoints, wanted.ipc_token, self._ipc_token)
            socket = self._transport.push(f"mirror {wanted.node_id}", endpoint, is_watched=True)
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
            self._sender.socket.close()
            self._sender = None


BACKFILL_BLOCKS = 8
"""Blocks of one message: some milliseconds of copying. A step's rows go in messages of as many positions at most: what
a device's copies go through stays small."""
MAX_BACKFILL_AHEAD_BYTES = 32 << 20
"""The back-fill waits for acknowledgements while this much is under way: a link that is slower than the copying is not
overrun, and rows have room behind it."""
MAX_BACKFILL_AHEAD_MESSAGES = 64
"""The same for small blocks: a socket queues a thousand messages, whatever is in them."""
MAX_SILENCE_S = 60.0
"""A mirror that acknowledges nothing for this long has lost what it waits for, or it hangs."""
MAX_UNACKNOWLEDGED_BYTES = 256 << 20
"""A mirror that lags this far is given up: it is back-filled anew when it has caught its breath."""


class MirrorSender:
    """One mirror of this stage. `is_broken` once it does not keep up: the router then begins anew."""

    def __init__(self, socket: MessageSocket, router_term: int, lease_term: int, attempt: int) -> None:
        """`attempt` counts the back-fills of this stage; a mirror that sees a higher one begins anew."""
        self.socket = socket
        self.router_term = router_term
        self.lease_term = lease_term
        self.attempt = attempt
        self.is_broken = False
        self.connected = False
        self._to_fill: deque[int] = deque()
        self._is_filled = False
        self._unacknowledged: deque[tuple[int, int]] = deque()
        """Sequence number and bytes."""
        self._waits_for = 0
        """The oldest of them when `look` looked."""
        self._waits_since_s = 0.0
        self._bytes_outstanding = 0
        self._num_sent = 0

    def begin(self, used_blocks: Iterable[int]) -> None:
        """Begins, as the mirror is connected. What is in blocks now is back-filled; what is written from now on is
        sent."""
        self.connected = True
        self._to_fill = deque(sorted(set(used_blocks)))

    @property
    def wants_to_send(self) -> bool:
        """Returns whether it is time for `send_blocks`. Not while the mirror has enough to take in."""
        if self._is_filled or self.is_broken or not self.connected:
            return False
        has_room = self._bytes_outstanding <= MAX_BACKFILL_AHEAD_BYTES
        return has_room and len(self._unacknowledged) < MAX_BACKFILL_AHEAD_MESSAGES

    def send_rows(self, memory: PagedMemory, positions: Tensor, mark: int) -> None:
        """Sends what a step has written at `positions` [T]; if that is much, in pieces, of which the last has the
        mark."""
        *before, last = torch.split(positions, BACKFILL_BLOCKS * KV_BLOCK_TOKENS)
        for piece, its_mark in (*((piece, 0) for piece in before), (last, mark)):
            if not self.is_broken and self.connected:
                self._send(memory, piece, its_mark, is_last=False)

    def send_blocks(self, memory: PagedMemory, mark: int) -> None:
        """Sends the next few blocks of the back-fill; the last message says so, also where there is no block at all."""
        ids = [self._to_fill.popleft() for _ in range(min(BACKFILL_BLOCKS, len(self._to_fill)))]
        self._is_filled = not self._to_fill
        self._send(memory, positions_of_blocks(torch.tensor(ids, dtype=torch.int64)), mark, is_last=self._is_filled)

    def acknowledged(self, applied: int) -> None:
        """Notes that the mirror has applied everything up to this sequence number."""
        while self._unacknowledged and self._unacknowledged[0][0] <= applied:
            self._bytes_outstanding -= self._unacknowledged.popleft()[1]

    def look(self, now_s: float) -> None:
        """Gives a mirror up that has left the same message unacknowledged for too long."""
        oldest = self._unacknowledged[0][0] if self._unacknowledged else 0
        if oldest != self._waits_for:
            self._waits_for, self._waits_since_s = oldest, now_s
        elif oldest and now_s - self._waits_since_s >= MAX_SILENCE_S:
            self.is_broken = True

    def _send(self, memory: PagedMemory, positions: Tensor, mark: int, *, is_last: bool) -> None:
        rows = memory.rows(positions)
        message = MirrorRows(
            self.lease_term,
            mark,
            is_last,
            tensor_to_frame(positions),
            tensor_to_frame(rows.keys),
            tensor_to_frame(rows.values),
            tensor_to_frame(rows.hidden),
        )
        try:
            self.socket.send(message, Header(router_term=self.router_term, attempt=self.attempt))
        except Full:
            self.is_broken = True
            return
        num_bytes = rows.keys.nbytes + rows.values.nbytes + rows.hidden.nbytes
        self._num_sent += 1
        self._unacknowledged.append((self._num_sent, num_bytes))
        self._bytes_outstanding += num_bytes
        self.is_broken = self._bytes_outstanding > MAX_UNACKNOWLEDGED_BYTES
