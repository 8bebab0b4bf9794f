"""The ring of a stage and an expert node of one host: memory that both have mapped, for calls (native/call_ring.h).

The stage makes it, of one size for good, as a file without a name, which the kernel frees with the last of the two
processes. It is handed over a Unix socket, with a bell of each side (an eventfd), to the incarnation of the node that
the stage means, and is in use for as long as that connection stands.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import mmap
import os
import socket
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

import msgpack

from common.errors import ProtocolError

HEAD_BYTES: Final = 128
"""Of each slot."""
SLOTS: Final = 4
"""Calls, or pieces of them, that one stage may have with one node at a time: two of each of two micro-batches."""
MAX_ROWS: Final = 256
"""Token rows of a slot: a chunk of a prompt has no more, by default. A larger call goes in pieces."""
USUAL_RING_BYTES: Final = 64 << 20
"""A ring is not larger; that of a wide model has fewer rows."""
_VERSION: Final = 1
_MAX_MESSAGE_BYTES: Final = 1024
_MAX_RING_BYTES: Final = 1 << 30
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Outcome(IntEnum):
    """What has become of a call; mirrors `Outcome` in native/call_ring.h."""

    GIVEN = 0
    MALFORMED = 1
    NOT_HELD = 2
    OUT_OF_TIME = 3
    DAMAGED = 4


_SIZES: Final = ("slots", "max_rows", "max_pairs", "width", "value_bytes")


class RingShape(ctypes.Structure):
    """The size of a ring; mirrors `RingShape` in native/call_ring.h."""

    _fields_ = [(name, ctypes.c_int64) for name in _SIZES]

    slots: int
    max_rows: int
    max_pairs: int
    width: int
    value_bytes: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RingShape) and bytes(self) == bytes(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def sizes(self) -> list[int]:
        """Returns its fields in their order."""
        return [int(getattr(self, name)) for name in _SIZES]

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of all slots, as native/call_ring.h lays them out."""
        parts = (
            self.max_pairs * 8,
            self.max_rows * self.width * self.value_bytes,
            self.max_pairs * self.width * self.value_bytes,
        )
        return self.slots * (HEAD_BYTES + sum((part + 63) // 64 * 64 for part in parts))


def ring_shape(width: int, value_bytes: int, pairs_per_token: int) -> RingShape:
    """Returns the shape of every ring of a mesh whose model has this width and so many (expert, slice) a token."""
    row_bytes = (1 + pairs_per_token) * width * value_bytes
    rows = max(1, min(MAX_ROWS, USUAL_RING_BYTES // (SLOTS * row_bytes)))
    return RingShape(SLOTS, rows, rows * pairs_per_token, width, value_bytes)


def ring_path(folder: Path, node_id: str) -> Path:
    """Returns where a node listens for rings, in a folder that the nodes of one host share."""
    return folder / f"{node_id}-rings"


def new_bell() -> int:
    """Returns the descriptor of a new eventfd. Raises OSError."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class RingMemory:
    """A ring's memory as this process has mapped it. Closed by the garbage collector: calls may be under way."""

    def __init__(self, descriptor: int, shape: RingShape) -> None:
        """Takes the descriptor over; -1: the memory is this process's own. Raises OSError, ValueError."""
        try:
            flags = mmap.MAP_SHARED if descriptor >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._map = mmap.mmap(descriptor, shape.num_bytes, flags)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        self._view = (ctypes.c_uint8 * shape.num_bytes).from_buffer(self._map)
        self.address = ctypes.addressof(self._view)


def make_ring(shape: RingShape) -> tuple[RingMemory, int]:
    """Returns new memory, allocated whole, and a descriptor of it to hand over. Raises OSError for want of memory."""
    descriptor = os.memfd_create("moemesh-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, shape.num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return RingMemory(os.dup(descriptor), shape), descriptor
    except OSError:
        os.close(descriptor)
        raise


@dataclass(frozen=True, slots=True)
class RingOffer:
    """What a stage says when it hands a ring over."""

    incarnation: int
    """Of the node that it means."""
    shape: RingShape
    descriptor: int
    """The memory."""
    bell: int
    """Rings when there is something for the stage."""


def send_offer(connection: socket.socket, offer: RingOffer) -> None:
    """Raises OSError."""
    body = msgpack.packb([_VERSION, offer.incarnation, *offer.shape.sizes])
    _send(connection, body, [offer.descriptor, offer.bell])


def receive_offer(connection: socket.socket) -> RingOffer:
    """Returns what a stage has sent. Raises BlockingIOError where it has not yet, OSError, and ProtocolError with the
    field that makes no sense; nothing is left open then."""
    body, descriptors = _receive(connection)
    try:
        fields = msgpack.unpackb(body)
        is_offer = isinstance(fields, list) and len(fields) == 7 and all(isinstance(field, int) for field in fields)
        if not is_offer or fields[0] != _VERSION or len(descriptors) != 2:
            raise ProtocolError(f"a ring's offer is version {_VERSION}, incarnation, 5 sizes and 2 descriptors")
        if any(not 1 <= size <= _MAX_RING_BYTES for size in fields[2:]):
            raise ProtocolError(f"a ring's offer has sizes {fields[2:]}: each is 1 to {_MAX_RING_BYTES}")
        shape = RingShape(*fields[2:])
        _check_memory(descriptors[0], shape)
        _check_bell(descriptors[1])
        return RingOffer(fields[1], shape, *descriptors)
    except (ProtocolError, OSError, ValueError, msgpack.UnpackException) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        raise error if isinstance(error, ProtocolError) else ProtocolError(f"a ring's offer: {error}") from None


def _check_memory(descriptor: int, shape: RingShape) -> None:
    """What could shrink under us would end the process at the next look into it."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    size = os.fstat(descriptor).st_size
    if not seals & fcntl.F_SEAL_SHRINK or not shape.num_bytes <= size <= _MAX_RING_BYTES:
        raise ProtocolError(f"a ring's memory has {size} bytes and seals {seals}: {shape.num_bytes} and F_SEAL_SHRINK")


def _check_bell(descriptor: int) -> None:
    """What is no eventfd, or waits, could hold whoever rings it."""
    if "eventfd-count" not in Path(f"/proc/self/fdinfo/{descriptor}").read_text():
        raise ProtocolError("a ring's bell is an eventfd")
    os.set_blocking(descriptor, False)


def send_verdict(connection: socket.socket, refusal: str, bell: int) -> None:
    """Tells the stage that its ring is in use from now on, with the node's bell, or why not. Raises OSError."""
    _send(connection, msgpack.packb(refusal[:500]), [] if refusal else [bell])


def receive_verdict(connection: socket.socket) -> int:
    """Returns the node's bell. Raises BlockingIOError where it has said nothing yet, OSError, and ProtocolError with
    its refusal."""
    body, descriptors = _receive(connection)
    try:
        refusal = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException):
        refusal = "its answer is not readable"
    try:
        if refusal or len(descriptors) != 1:
            raise ProtocolError(f"the ring was refused: {refusal or 'no bell came with it'}")
        _check_bell(descriptors[0])
        return descriptors[0]
    except (ProtocolError, OSError):
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _send(connection: socket.socket, body: bytes, descriptors: list[int]) -> None:
    connection.sendmsg([body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    body, descriptors, _, _ = socket.recv_fds(connection, _MAX_MESSAGE_BYTES, 4)
    if not body:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ConnectionResetError("the other side is gone")
    return body, descriptors
