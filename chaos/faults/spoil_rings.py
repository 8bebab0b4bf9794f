"""Bytes change in the memory that a stage and an expert node share for their calls: no answer may be used with them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from chaos.faults.background import BackgroundFault
from chaos.faults.base import Range
from chaos.faults.rings import Ring, SlotState, rings_of, stopped_process
from chaos.target import Node, Target, TargetError
from common.wire.call_ring import HEAD_BYTES, SLOTS

_LINE_BYTES = 64
ANSWER_S = 0.02
"""How long a stopped victim is waited for: meanwhile the nodes answer what it has asked."""


class SpoilRings(BackgroundFault):
    """Every `every_s` each victim is stopped for a moment, and one bit of each 64 bytes of the calls that lie in its
    rings is changed: of what is asked and not begun, and of answers that it has not read. Until it is healed."""

    name = "spoil_rings"
    every_s: Annotated[float, Range(0.01, 10)] = 0.2
    head_share: Annotated[float, Range(0, 1)] = 0.2
    """In so many of them a bit of the head is changed besides: of the state, a number, a checksum."""
    seed: Annotated[int, Range(0, 1 << 31)] = 0

    def unavailable(self, target: Target) -> str:
        return "" if Path("/proc/self/maps").exists() else "this system has no /proc, which tells where a ring is"

    def can_hurt(self, node: Node) -> bool:
        return bool(rings_of(node))

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        rings = [ring for victim in victims for ring in rings_of(victim)]
        if not rings:
            raise TargetError(f"{', '.join(victim.name for victim in victims)}: no ring is mapped there")
        for ring in rings:
            try:
                _ = ring.slot_bytes
                with open(f"/proc/{ring.pid}/mem", "r+b", buffering=0):
                    pass
            except OSError as error:
                raise TargetError(f"the rings of process {ring.pid} cannot be changed: {error}") from None
        self._begin(lambda: self._spoil(rings, random.Random(self.seed)), patience_s=0.0)

    def _spoil(self, rings: Sequence[Ring], draw: random.Random) -> None:
        processes = sorted({ring.pid for ring in rings})
        while not self._stopped.wait(self.every_s):
            for pid in processes:
                with contextlib.suppress(ProcessLookupError), stopped_process(pid):
                    self._stopped.wait(ANSWER_S)
                    for ring in (ring for ring in rings if ring.pid == pid):
                        spoil_calls(ring, self.head_share, draw)


def spoil_calls(ring: Ring, head_share: float, draw: random.Random) -> int:
    """Changes bits of each slot whose call is asked, or answered and not read. Returns how many slots that were."""
    num_spoilt = 0
    try:
        slot_bytes = ring.slot_bytes
        with open(f"/proc/{ring.pid}/mem", "r+b", buffering=0) as memory:
            for slot in range(SLOTS):
                place = ring.start + slot * slot_bytes
                memory.seek(place)
                data = memory.read(slot_bytes)
                if int.from_bytes(data[:4], "little") not in (SlotState.ASKED, SlotState.ANSWERED):
                    continue
                num_spoilt += 1
                lines = range(HEAD_BYTES, slot_bytes - _LINE_BYTES, _LINE_BYTES)
                spoilt = [line + draw.randrange(_LINE_BYTES) for line in lines]
                if draw.random() < head_share:
                    spoilt.append(draw.randrange(HEAD_BYTES))
                for offset in spoilt:  # one by one: the other side goes on writing
                    memory.seek(place + offset)
                    memory.write(bytes([data[offset] ^ 1 << draw.randrange(8)]))
    except (OSError, ValueError):
        return num_spoilt  # it has ended meanwhile, or has given the ring up
    return num_spoilt
