"""The receiving side of a mirror: a copy of another stage's paged memory, and up to which step it is whole."""

from __future__ import annotations

from dataclasses import dataclass, field

import structlog
import torch

from common.errors import ProtocolError
from common.messages import AssignMirror, Header, MirrorAck, MirrorReady, MirrorRows
from common.wire.tensor import frame_to_tensor
from common.wire.transport import Full, LinkEvent, MessageSocket
from services.stage.model.kv_cache import PagedMemory, Rows
from services.stage.model.paged_attention import KV_BLOCK_TOKENS


@dataclass(slots=True)
class Mirror:
    """A copy that grows. `socket` leads back to the holder, for acknowledgements."""

    role: AssignMirror
    router_term: int
    memory: PagedMemory
    socket: MessageSocket
    log: structlog.stdlib.BoundLogger
    number: int = 0
    """The number of this role."""
    mark: int = 0
    """All steps up to this one are in the copy, once it is complete."""
    is_complete: bool = False
    broken_stream: int = 0
    """Attempt of the last stream that had a gap or did not fit; nothing of it is taken. 0: none had."""
    attempt: int = 0
    """The attempt of the stream that is taken now."""
    last_sequence_number: int = 0
    written_blocks: set[int] = field(default_factory=set)
    """What was ever copied into: which sequences that is, and whether they still live, a mirror is not told."""
    acknowledged: int = 0

    @property
    def is_spoilt(self) -> bool:
        """Returns whether the stream that is taken now is broken: it must begin anew."""
        return self.broken_stream == self.attempt > 0

    def follows(self, message: MirrorRows, header: Header) -> bool:
        """Returns whether it comes from the slot's holder, and not from one that was replaced and woke up, in a stream
        that was not given up."""
        is_of_holder = (header.router_term, message.lease_term) == (self.router_term, self.role.lease_term)
        return is_of_holder and header.attempt >= self.attempt

    def apply(self, message: MirrorRows, header: Header) -> bool:
        """Applies one message of the stream that is followed. True if the router must hear what has become of the copy.

        A stream that has a gap or does not fit begins anew: the copy is worth nothing until then.
        """
        if self.is_spoilt and header.attempt == self.attempt:
            return False
        try:
            has_become_complete = self._apply(message, header)
        except ProtocolError as error:
            self.log.error("mirror_spoilt", reason=str(error))
            self.broken_stream, self.is_complete = header.attempt, False
            return True
        if has_become_complete:
            self.log.info("mirror_complete", pipeline=self.role.pipeline, slot=self.role.slot, mark=self.mark)
        return has_become_complete

    def _apply(self, message: MirrorRows, header: Header) -> bool:
        if header.attempt > self.attempt:
            self.attempt, self.last_sequence_number, self.acknowledged, self.mark = header.attempt, 0, 0, 0
            self.is_complete = False
        self.last_sequence_number += 1
        if header.sequence_number != self.last_sequence_number:
            raise ProtocolError(
                f"message {header.sequence_number} of the mirrored stage came when message "
                f"{self.last_sequence_number} was due"
            )
        was_complete = self.is_complete
        self._put_rows(message)
        self.is_complete = was_complete or message.is_last
        self.mark = max(self.mark, message.mark)
        self._acknowledge()
        return self.is_complete and not was_complete

    def report(self) -> MirrorReady:
        """Returns what the router is told of the copy."""
        role = self.role
        return MirrorReady(role.pipeline, role.slot, role.lease_term, self.is_complete, self.broken_stream)

    def look(self) -> None:
        """Acknowledges what could not be acknowledged when it was applied; for each round of the loop.

        Over a new connection that is also what may have been lost with the one before.
        """
        if LinkEvent.CONNECTED in self.socket.link_events():
            self.acknowledged = 0
        self._acknowledge()

    def _acknowledge(self) -> None:
        """Says what was applied, unless that was said. Its holder may wait for it before it sends more."""
        if self.is_spoilt or self.acknowledged == self.last_sequence_number:
            return
        try:
            self.socket.send(MirrorAck(self.role.lease_term, self.last_sequence_number), Header(attempt=self.attempt))
        except Full:
            return  # not connected yet, or busy: to be called again
        self.acknowledged = self.last_sequence_number

    def _put_rows(self, message: MirrorRows) -> None:
        positions = frame_to_tensor(message.positions, torch.int64, (None,), "MirrorRows.positions")
        limit = self.memory.num_blocks * KV_BLOCK_TOKENS
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < limit:
            raise ProtocolError(f"MirrorRows.positions names a place outside [0, {limit})")
        kv = self.memory.kv.shape
        shape = kv.of_rows(len(positions))
        log_rows = len(positions) if self.memory.has_log else 0
        rows = Rows(
            frame_to_tensor(message.keys, kv.dtype, shape, "MirrorRows.keys"),
            frame_to_tensor(message.values, kv.dtype, shape, "MirrorRows.values"),
            frame_to_tensor(message.hidden, kv.dtype, (log_rows, self.memory.log.shape[1]), "MirrorRows.hidden"),
        )
        if len(positions):
            self.memory.put_rows(positions, rows)
            self.written_blocks.update((positions // KV_BLOCK_TOKENS).tolist())
