"""The process that computes placements: `python -m services.router.mesh.placement_process PARENT`, the router's child.

Requests come on stdin, answers go to stdout. It ends when the router does, whose process id PARENT is.
"""

from __future__ import annotations

import dataclasses
import signal
import struct
import sys
from typing import Any, BinaryIO, Final

import msgpack
import numpy as np

from common.processes.child_process import end_with_parent
from services.router.control.experts.placement import ExpertNodeCapacity
from services.router.control.experts.placing import PlacementAnswer, PlacementRequest, answer_request

LENGTH: Final = struct.Struct("<Q")
"""The length that stands before every message on the pipes."""


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers until the requests end."""
    while len(head := requests.read(LENGTH.size)) == LENGTH.size:
        request = decode_request(requests.read(LENGTH.unpack(head)[0]))
        answers.write(encode(answer_request(request)))
        answers.flush()


def encode(message: PlacementRequest | PlacementAnswer) -> bytes:
    """Returns the message with its length before it."""
    body: bytes = msgpack.packb(_fields(message), default=_plain)
    return LENGTH.pack(len(body)) + body


def decode_request(body: bytes) -> PlacementRequest:
    """Reads the message without its length."""
    return PlacementRequest(**msgpack.unpackb(body, use_list=False, object_hook=_read))


def decode_answer(body: bytes) -> PlacementAnswer:
    """Reads the message without its length."""
    return PlacementAnswer(**msgpack.unpackb(body, use_list=False, object_hook=_read))


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _plain(value: Any) -> Any:
    """Returns a node's fields, or an array or a set as msgpack can write it."""
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "shape": value.shape, "data": value.tobytes()}
    return sorted(value) if isinstance(value, frozenset) else _fields(value)


def _read(fields: dict[str, Any]) -> Any:
    """Returns what `_plain` has made a map of."""
    if "dtype" in fields:
        return np.frombuffer(fields["data"], fields["dtype"]).reshape(fields["shape"])
    if "node_id" in fields:
        experts = None if fields["experts"] is None else frozenset(fields["experts"])
        return ExpertNodeCapacity(**fields | {"experts": experts})
    return fields


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the router's to answer
    serve(sys.stdin.buffer, sys.stdout.buffer)
