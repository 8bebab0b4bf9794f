"""Placement requests and answers as bytes, between the router and the process that computes placements."""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any, Final

import msgpack
import numpy as np

from common.ids import NodeId
from services.router.control.experts.placement import ExpertNodeCapacity
from services.router.control.experts.placing import PlacementAnswer, PlacementRequest

LENGTH: Final = struct.Struct("<Q")
"""Before every message on the pipes."""


def encode_request(request: PlacementRequest) -> bytes:
    """With its length."""
    nodes = [
        dataclasses.asdict(node) | {"experts": None if node.experts is None else sorted(node.experts)}
        for node in request.nodes
    ]
    fields = _fields(request) | {"nodes": nodes, "ready": request.ready.tobytes(), "told": request.told.tobytes()}
    return _with_length(fields)


def decode_request(body: bytes) -> PlacementRequest:
    """Without its length."""
    fields = _unpack(body)
    holders = tuple(map(NodeId, fields["holders"]))
    row_bytes = -(-math.prod(fields["shape"]) // 8)
    for name in ("ready", "told"):
        fields[name] = np.frombuffer(fields[name], dtype=np.uint8).reshape(len(holders), row_bytes)
    nodes = tuple(
        ExpertNodeCapacity(**node | {"experts": None if node["experts"] is None else frozenset(node["experts"])})
        for node in fields["nodes"]
    )
    return PlacementRequest(**fields | {"holders": holders, "nodes": nodes})


def encode_answer(answer: PlacementAnswer) -> bytes:
    """With its length."""
    return _with_length(_fields(answer) | {"owners": answer.owners.tobytes(), "shape": answer.owners.shape})


def decode_answer(body: bytes) -> PlacementAnswer:
    """Without its length."""
    fields = _unpack(body)
    owners = np.frombuffer(fields["owners"], dtype=np.int32).reshape(fields.pop("shape"))
    return PlacementAnswer(**fields | {"owners": owners, "node_ids": tuple(map(NodeId, fields["node_ids"]))})


def _fields(message: PlacementRequest | PlacementAnswer) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}


def _with_length(fields: dict[str, Any]) -> bytes:
    body: bytes = msgpack.packb(fields)
    return LENGTH.pack(len(body)) + body


def _unpack(body: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(body, use_list=False)
    return fields
