"""Links (native/call_link.h), as far as Python has to do with them: what their sockets are set to, and the functions of
the libzmq that pyzmq has loaded, for native code that uses these sockets."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import replace
from typing import Final

import zmq

from common.wire.call_ring import MAX_LINK_FRAME_BYTES, SLOTS
from common.wire.transport import SocketLimits

MAX_QUEUED_CALLS: Final = 8 * SLOTS
"""Frames of a link that wait to be sent to one peer: it is owed no more than there are slots, but what it has taken is
told to the sender only once it is half of these."""
_NAMES: Final = (
    *(f"zmq_msg_{name}" for name in ("init", "init_size", "data", "size", "more", "move", "close", "send", "recv")),
    "zmq_poll",
)


def link_limits(limits: SocketLimits) -> SocketLimits:
    """Returns what sockets of links are set to, where others have `limits`: no peer takes more than its slots have."""
    return replace(limits, high_water_mark=MAX_QUEUED_CALLS, max_message_bytes=MAX_LINK_FRAME_BYTES)


class ZmqFunctions(ctypes.Structure):
    """Mirrors `Zmq` in common/compute/native/call_link.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in _NAMES]


def zmq_functions() -> ZmqFunctions | None:
    """Returns where they are; None where libzmq is older than 4, or pyzmq's build does not show them."""
    if zmq.zmq_version_info()[0] != 4:
        return None  # another version's messages may be of another size
    try:
        # What a library was linked with is found through it.
        library = ctypes.CDLL(importlib.import_module("zmq.backend.cython._zmq").__file__)
        return ZmqFunctions(*(ctypes.cast(library[name], ctypes.c_void_p).value for name in _NAMES))
    except (ImportError, OSError, AttributeError):
        return None
