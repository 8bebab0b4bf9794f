"""Calls as they travel over links between native code (native/call_link.h), told from all other messages. Pure."""

from __future__ import annotations

import struct
from typing import Literal

from chaos.proxy.zmtp_frames import Message

CallFrame = Literal["answer", "question"]
_HEAD = struct.Struct("<IIqqqqqQQ")
"""State, outcome, number, layer, time left, rows, pairs, two checksums."""
_FREE, _GIVEN = 0, 0


def call_frame(message: Message) -> CallFrame | None:
    """Returns what of a call a message is: a question, or an answer with rows; None: neither.

    It is one frame and begins with four zeros, a slot's state that is none; other messages begin with four letters.
    """
    if len(message) != 1 or len(message[0]) <= _HEAD.size:
        return None
    state, outcome, _, _, _, rows, pairs, _, _ = _HEAD.unpack_from(message[0])
    if state != _FREE:
        return None
    if rows > 0 and pairs > 0:
        return "question"
    return "answer" if (outcome, rows, pairs) == (_GIVEN, 0, 0) else None
