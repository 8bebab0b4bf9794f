"""What a spare does with the rows of the slot that it mirrors."""

from __future__ import annotations

import structlog

from common.errors import ProtocolError
from common.messages import Header, MirrorBlocks, MirrorReady, MirrorRows
from common.node.control_link import ControlLink
from common.wire.transport import LinkEvent
from services.stage.slot.mirror_receiver import Mirror
from services.stage.slot.stage_worker import SlotKeeper


class MirrorIntake:
    """Rows come in, the router hears when the copy becomes complete or worthless."""

    def __init__(self, keeper: SlotKeeper, control: ControlLink, log: structlog.stdlib.BoundLogger) -> None:
        self._keeper = keeper
        self._control = control
        self._log = log
        self.dropped = 0
        """Messages of a holder that was replaced, of an attempt that was given up, or for nobody."""

    def take(self, message: MirrorRows | MirrorBlocks, header: Header) -> None:
        """Apply one message. A stream that does not fit begins anew: the router is told."""
        mirror = self._keeper.mirror
        if mirror is None or not mirror.follows(message, header) or header.attempt < mirror.attempt:
            self.dropped += 1
            return
        if mirror.is_spoilt and header.attempt == mirror.attempt:
            return
        try:
            has_become_complete = mirror.take(message, header)
        except ProtocolError as error:
            self._log.error("mirror_spoilt", reason=str(error))
            mirror.broken_stream, mirror.is_complete = header.attempt, False
            self._report(mirror)
            return
        if has_become_complete:
            self._log.info("mirror_complete", pipeline=mirror.role.pipeline, slot=mirror.role.slot, mark=mirror.mark)
            self._report(mirror)

    def acknowledge(self) -> None:
        """What could not be acknowledged when it was applied, and over a new connection what may have been lost with
        the one before; for each round of the loop."""
        mirror = self._keeper.mirror
        if mirror is None:
            return
        if LinkEvent.CONNECTED in mirror.socket.link_events():
            mirror.acknowledged = 0
        mirror.acknowledge()

    def _report(self, mirror: Mirror) -> None:
        role = mirror.role
        report = MirrorReady(role.pipeline, role.slot, role.lease_term, mirror.is_complete, mirror.broken_stream)
        self._control.send(report, Header(generation=mirror.number))
