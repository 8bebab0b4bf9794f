"""The functions of the libzmq that pyzmq has loaded, for native code that uses a socket which Python has made."""

from __future__ import annotations

import ctypes
import importlib
from typing import Final

import zmq

_NAMES: Final = (
    *(f"zmq_msg_{name}" for name in ("init", "init_size", "data", "size", "more", "move", "close", "send", "recv")),
    "zmq_poll",
)


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
