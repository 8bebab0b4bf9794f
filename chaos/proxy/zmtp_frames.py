"""The bytes of one ZeroMQ connection as what they mean, and the damage that can be done to a message. Pure.

ZMTP 3.x (rfc.zeromq.org/spec/23): each side sends a greeting of 64 bytes, then frames

    [flags: 1 byte: 1 more, 2 long, 4 command] [length: 1 byte, or 8 if long] [payload]

Commands (the handshake, pings) are never damaged: a connection that breaks is another fault. Messages are sequences of
frames, and only exist after the handshake.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from typing import Literal

GREETING_BYTES = 64
_MORE, _LONG, _COMMAND = 1, 2, 4
_LENGTH = struct.Struct(">Q")

Message = tuple[bytes, ...]
"""Payloads of its frames, in order."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of the stream that ends where a message or command ends: never damaged bytes, or one whole message."""

    raw: bytes
    """Its bytes as they came."""
    message: Message = ()
    """Its frames; empty for a greeting or command."""


class ZmtpStream:
    """Cuts one direction of a connection into passages. Bytes of an unfinished passage wait here.

    What is not ZMTP (a length beyond `max_frame_bytes`) is passed on as it comes from there on: it is for the receiver
    to refuse.
    """

    def __init__(self, max_frame_bytes: int = 1 << 31) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._pending = bytearray()
        self._greeting_left = GREETING_BYTES
        self._is_foreign = False
        self._scanned = 0
        self._payloads: list[tuple[int, int]] = []

    def feed(self, data: bytes) -> list[Passage]:
        """Returns the passages that these bytes complete, in order; their `raw` joined is the stream so far."""
        self._pending += data
        passages = []
        while (passage := self._next()) is not None:
            passages.append(passage)
        return passages

    def rest(self) -> bytes:
        """Returns what waits unfinished; the end of a connection may come in the middle of a frame."""
        return bytes(self._pending)

    def _next(self) -> Passage | None:
        if self._is_foreign:
            return Passage(self._pop(len(self._pending))) if self._pending else None
        if self._greeting_left and self._pending:
            # In pieces, as it comes: a side sends the rest of its greeting only when it has seen the other's beginning.
            piece = self._pop(min(self._greeting_left, len(self._pending)))
            self._greeting_left -= len(piece)
            return Passage(piece)
        while (frame := self._frame_at(self._scanned)) is not None:
            flags, start, stop = frame
            if stop - start > self.max_frame_bytes:
                self._is_foreign = True
                return self._next()
            if stop > len(self._pending):
                return None
            self._scanned = stop
            if flags & _COMMAND:
                # Between the frames of one message there is none; where a peer does it all the same, it goes along.
                if not self._payloads:
                    return Passage(self._pop(stop))
                continue
            self._payloads.append((start, stop))
            if not flags & _MORE:
                message = tuple(bytes(self._pending[first:last]) for first, last in self._payloads)
                return Passage(self._pop(stop), message)
        return None

    def _frame_at(self, position: int) -> tuple[int, int, int] | None:
        """Returns flags and `[start, stop)` of the payload of the frame there, or None while its head is incomplete."""
        if position >= len(self._pending):
            return None
        flags = self._pending[position]
        if flags & _LONG:
            if len(self._pending) < position + 9:
                return None
            (length,) = _LENGTH.unpack_from(self._pending, position + 1)
            return flags, position + 9, position + 9 + int(length)
        if len(self._pending) < position + 2:
            return None
        return flags, position + 2, position + 2 + self._pending[position + 1]

    def _pop(self, count: int) -> bytes:
        popped = bytes(self._pending[:count])
        del self._pending[:count]
        self._scanned = 0
        self._payloads = []
        return popped


def write_message(message: Message) -> bytes:
    """Returns the frames of a message (at least one) as bytes."""
    pieces = []
    for place, payload in enumerate(message):
        flags = _MORE if place < len(message) - 1 else 0
        if len(payload) > 255:
            pieces += [bytes([flags | _LONG]), _LENGTH.pack(len(payload)), payload]
        else:
            pieces += [bytes([flags, len(payload)]), payload]
    return b"".join(pieces)


def corrupt(message: Message, draw: random.Random) -> Message:
    """Flips one bit of one frame; a message of empty frames only stays as it is."""
    places = [place for place, payload in enumerate(message) if payload]
    if not places:
        return message
    place = draw.choice(places)
    payload = bytearray(message[place])
    payload[draw.randrange(len(payload))] ^= 1 << draw.randrange(8)
    return (*message[:place], bytes(payload), *message[place + 1 :])


def truncate(message: Message, draw: random.Random) -> Message:
    """Cuts the end off the last frame that has bytes, 1 byte to all; the connection itself stays in order."""
    places = [place for place, payload in enumerate(message) if payload]
    if not places:
        return message
    place = places[-1]
    kept = draw.randrange(len(message[place]))
    return (*message[:place], message[place][:kept], *message[place + 1 :])


Damage = Literal["corrupt", "truncate", "replay", "reorder", "lose"]


@dataclass(frozen=True, slots=True)
class FrameRule:
    """Messages are damaged, each with this probability, above 0 and at most 1.

    `reorder` holds a message back until the next one has gone. `replay` sends it twice, `lose` not at all.
    """

    kind: Damage
    probability: float
    seed: int


class FrameDamage:
    """Damages the messages of one direction by a rule, as a seeded generator says."""

    def __init__(self, rule: FrameRule) -> None:
        self._rule = rule
        self._draw = random.Random(rule.seed)
        self._held: Message | None = None

    def pass_on(self, message: Message) -> list[Message]:
        """Returns what goes on in place of this message, in order; nothing while it is held back."""
        if self._held is not None:
            held, self._held = self._held, None
            return [message, held]
        if self._draw.random() >= self._rule.probability:
            return [message]
        if self._rule.kind == "corrupt":
            return [corrupt(message, self._draw)]
        if self._rule.kind == "truncate":
            return [truncate(message, self._draw)]
        if self._rule.kind == "replay":
            return [message, message]
        if self._rule.kind == "reorder":
            self._held = message
        return []

    def release(self) -> list[Message]:
        """Returns what is still held back when the damage ends."""
        held, self._held = self._held, None
        return [] if held is None else [held]
