"""The process that computes placements: `python -m services.router.mesh.placement_process PARENT`, the router's child.

Requests come on stdin, answers go to stdout. It ends when the router does, whose process id PARENT is.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import struct
import sys
from typing import Any, BinaryIO, Final

import msgpack
import numpy as np

from common.ids import NodeId
from common.processes.child_process import end_with_parent
from services.router.control.experts.placement import ExpertNodeCapacity
from services.router.control.experts.placing import PlacementAnswer, PlacementRequest, answer_request
from services.router.control.experts.shard_bits import num_words

LENGTH: Final = struct.Struct("<Q")
"""The length that stands before every message on the pipes."""


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers until the requests end."""
    while len(head := requests.read(LENGTH.size)) == LENGTH.size:
        request = decode_request(requests.read(LENGTH.unpack(head)[0]))
        answers.write(encode_answer(answer_request(request)))
        answers.flush()


def encode_request(request: PlacementRequest) -> bytes:
    """Returns the message with its length before it."""
    nodes = [
        dataclasses.asdict(node) | {"experts": None if node.experts is None else sorted(node.experts)}
        for node in request.nodes
    ]
    fields = _fields(request) | {"nodes": nodes, "ready": request.ready.tobytes(), "told": request.told.tobytes()}
    return _with_length(fields)


def decode_request(body: bytes) -> PlacementRequest:
    """Reads the message without its length."""
    fields: dict[str, Any] = msgpack.unpackb(body, use_list=False)
    holders = tuple(map(NodeId, fields["holders"]))
    row_words = num_words(math.prod(fields["shape"]))
    for name in ("ready", "told"):
        fields[name] = np.frombuffer(fields[name], dtype=np.uint64).reshape(len(holders), row_words)
    nodes = tuple(
        ExpertNodeCapacity(**node | {"experts": None if node["experts"] is None else frozenset(node["experts"])})
        for node in fields["nodes"]
    )
    return PlacementRequest(**fields | {"holders": holders, "nodes": nodes})


def encode_answer(answer: PlacementAnswer) -> bytes:
    """Returns the message with its length before it."""
    return _with_length(_fields(answer) | {"owners": answer.owners.tobytes(), "shape": answer.owners.shape})


def decode_answer(body: bytes) -> PlacementAnswer:
    """Reads the message without its length."""
    fields: dict[str, Any] = msgpack.unpackb(body, use_list=False)
    owners = np.frombuffer(fields["owners"], dtype=np.int32).reshape(fields.pop("shape"))
    return PlacementAnswer(**fields | {"owners": owners, "node_ids": tuple(map(NodeId, fields["node_ids"]))})


def _fields(message: PlacementRequest | PlacementAnswer) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}


def _with_length(fields: dict[str, Any]) -> bytes:
    body: bytes = msgpack.packb(fields)
    return LENGTH.pack(len(body)) + body


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the router's to answer
    serve(sys.stdin.buffer, sys.stdout.buffer)
