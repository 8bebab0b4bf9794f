"""The sending side of a mirror: back-fill what is there, then every row that a step writes. In order, bounded.

Whole blocks go a few at a time between steps, so that a late mirror does not stop the stage; a row that is written
meanwhile goes at once, before or after its block: the block is copied as it is when its turn comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from common.messages import Header, Message, MirrorBlocks, MirrorRows
from common.wire.tensor import tensor_to_frame
from common.wire.transport import Full, MessageSocket
from services.stage.model.kv_cache import PagedMemory

BACKFILL_BLOCKS = 8
"""Of one message: some milliseconds of copying."""
MAX_BACKFILL_AHEAD_BYTES = 32 << 20
"""The back-fill waits for acknowledgements while so much is under way: a link that is slower than the copying is not
overrun, and rows have room behind it."""
MAX_BACKFILL_AHEAD_MESSAGES = 64
"""The same for small blocks: a socket queues a thousand messages, whatever is in them."""
MAX_SILENCE_S = 60.0
"""A mirror that acknowledges nothing for so long has lost what it waits for, or it hangs."""
MAX_UNACKNOWLEDGED_BYTES = 256 << 20
"""A mirror that lags so far is given up: it is back-filled anew when it has caught its breath."""


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
        """The mirror is connected. What is in blocks now is back-filled; what is written from now on is sent."""
        self.connected = True
        self._to_fill = deque(sorted(set(used_blocks)))

    @property
    def wants_to_send(self) -> bool:
        """Whether it is time for `send_blocks`. Not while the mirror has enough to take in."""
        if self._is_filled or self.is_broken or not self.connected:
            return False
        has_room = self._bytes_outstanding <= MAX_BACKFILL_AHEAD_BYTES
        return has_room and len(self._unacknowledged) < MAX_BACKFILL_AHEAD_MESSAGES

    def send_rows(self, memory: PagedMemory, positions: Tensor, mark: int) -> None:
        """What a step has written at `positions` [T]."""
        if self.is_broken or not self.connected:
            return
        rows = memory.rows(positions)
        message = MirrorRows(
            self.lease_term,
            mark,
            tensor_to_frame(positions),
            tensor_to_frame(rows.keys),
            tensor_to_frame(rows.values),
            tensor_to_frame(rows.hidden if rows.hidden.shape[0] == len(positions) else rows.hidden[:0]),
        )
        self._send(message, rows.keys.nbytes + rows.values.nbytes + rows.hidden.nbytes)

    def send_blocks(self, memory: PagedMemory, mark: int) -> None:
        """The next few blocks of the back-fill; the last message says so, also where there is no block at all."""
        ids = [self._to_fill.popleft() for _ in range(min(BACKFILL_BLOCKS, len(self._to_fill)))]
        block_ids = torch.tensor(ids, dtype=torch.int64)
        blocks = memory.blocks(block_ids)
        self._is_filled = not self._to_fill
        message = MirrorBlocks(
            self.lease_term,
            mark,
            self._is_filled,
            tensor_to_frame(block_ids.to(torch.int32)),
            tensor_to_frame(blocks.keys),
            tensor_to_frame(blocks.values),
            tensor_to_frame(blocks.hidden),
        )
        self._send(message, blocks.keys.nbytes + blocks.values.nbytes + blocks.hidden.nbytes)

    def acknowledged(self, applied: int) -> None:
        """The mirror has applied everything up to this sequence number."""
        while self._unacknowledged and self._unacknowledged[0][0] <= applied:
            self._bytes_outstanding -= self._unacknowledged.popleft()[1]

    def look(self, now_s: float) -> None:
        """Give a mirror up that has left the same message unacknowledged for too long."""
        oldest = self._unacknowledged[0][0] if self._unacknowledged else 0
        if oldest != self._waits_for:
            self._waits_for, self._waits_since_s = oldest, now_s
        elif oldest and now_s - self._waits_since_s >= MAX_SILENCE_S:
            self.is_broken = True

    def close(self) -> None:
        """To nobody any more."""
        self.socket.close()

    def _send(self, message: Message, num_bytes: int) -> None:
        try:
            self.socket.send(message, Header(router_term=self.router_term, attempt=self.attempt))
        except Full:
            self.is_broken = True
            return
        self._num_sent += 1
        self._unacknowledged.append((self._num_sent, num_bytes))
        self._bytes_outstanding += num_bytes
        self.is_broken = self._bytes_outstanding > MAX_UNACKNOWLEDGED_BYTES
