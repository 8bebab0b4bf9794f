"""Message <-> frames, the only place that knows bytes.

    [prefix: magic, version, flags, checksum | msgpack map] [small tensors, each padded to 8 bytes] [large tensor]*
    [the same prefix | head | trace, padded to 8 bytes | routing, weights] [hidden states]

The prefix is 16 bytes: `MOEM`, version (uint16), flags (uint16), xxh3-64 over what follows it and all frames, seeded
with version and flags (a message of one version that became another's on its way must not go unseen). The map
holds the kind, the header's counters, the message's scalar fields by name and, for each tensor field, dtype and shape.
Tensors of up to SMALL_BYTES share a frame, which there is where a message has tensor fields; others have one each.
Decoding goes through an explicit table of kinds and checks version, kind, types, bounds, lengths and checksum before
anything is handed on. A version that has only added fields understands the one before: such fields have defaults, and
an older message may lack them. Nothing is ever unpickled.

The second form, with the flag FIXED, is that of the two kinds of which a token needs many, `Dispatch` and `ExpertRows`:
each value has its place, and what is small travels with the head, so that either is two frames. A change to their
fields gives others another meaning.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence
from typing import Any, Final, NoReturn, get_type_hints

import msgpack
import xxhash

from common import messages
from common.errors import ProtocolError
from common.messages import OLDEST_VERSION, PROTOCOL_VERSION, Header, Message, TensorFrame

MAX_FRAMES: Final = 16
MAX_HEADER_BYTES: Final = 4 << 20
"""Of a map."""
MAX_FIXED_BYTES: Final = 1 << 28
"""Of a header frame with fixed places: 12 bytes for each pair of a token and an expert, 4 for each weight."""
MAX_ELEMENTS: Final = 1 << 31
MAX_DIMENSIONS: Final = 4
MAX_ENTRIES: Final = 1 << 13
"""The longest tuple in the map; a decoder may set aside memory for all that one of many nested arrays claims."""

SMALL_BYTES: Final = 1 << 12
"""A frame takes as long as copying some KiB, and a step has fourteen arrays, most of them of a few bytes."""

FIXED: Final = 1
"""The flag of a message whose values have fixed places."""

_MAGIC: Final = b"MOEM"
_PREFIX: Final = struct.Struct("<4sHHQ")
_INT64: Final = 1 << 63

ITEM_BYTES: Final[dict[str, int]] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
}

_KINDS: Final[dict[int, type[Message]]] = {
    1: messages.Hello,
    2: messages.Welcome,
    3: messages.AssignStage,
    4: messages.Unassign,
    5: messages.StageReady,
    6: messages.AssignShards,
    7: messages.ShardsReady,
    8: messages.PublishPlacement,
    10: messages.Leave,
    11: messages.LeaveAcknowledged,
    12: messages.Failed,
    13: messages.AssignMirror,
    14: messages.MirrorReady,
    15: messages.MirrorTo,
    16: messages.StageHeartbeat,
    17: messages.ExpertHeartbeat,
    20: messages.Step,
    21: messages.StepResult,
    22: messages.MirrorRows,
    24: messages.MirrorAck,
    32: messages.CancelCall,
}
_NUMBERS: Final[dict[type[Message], int]] = {kind: number for number, kind in _KINDS.items()}


def _plan(kind: type[Any]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Returns scalar fields with the name of their type, and tensor fields, in the order of the dataclass."""
    names = {int: "int", float: "float", str: "str", bool: "bool", tuple[str, ...]: "strs", tuple[int, ...]: "ints"}
    hints = get_type_hints(kind)
    scalars, tensors = [], []
    for field in dataclasses.fields(kind):
        if hints[field.name] is TensorFrame:
            tensors.append(field.name)
        else:
            scalars.append((field.name, names[hints[field.name]]))
    return tuple(scalars), tuple(tensors)


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """Returns the values of the fields that a message of the version before may lack, in the order of the dataclass."""
    fields = dataclasses.fields(kind)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


_PLANS: Final = {kind: _plan(kind) for kind in _NUMBERS}
_FIELDS: Final = {kind: frozenset(name for name, _ in scalars) for kind, (scalars, _) in _PLANS.items()}
_DEFAULTS: Final = {kind: _defaults(kind) for kind in _NUMBERS}
_HEADER_FIELDS: Final = tuple(field.name for field in dataclasses.fields(Header))

MAX_TRACE: Final = 128
"""Characters."""


_ALIGNMENT: Final = 8
_HEAD: Final = struct.Struct("<HHBBH12Q")
"""Number of the kind, bytes of the trace, number of the dtype, zero, zero, the header's seven counters, the call's
number, rows and width of the tensor frame, pairs of `routing`, weights."""
_DISPATCH: Final = 30
_ROWS: Final = 31
_DTYPES: Final = tuple(ITEM_BYTES)
_DTYPE_NUMBERS: Final = {name: number for number, name in enumerate(_DTYPES)}
_COUNTERS: Final = (*_HEADER_FIELDS[:7], "call", "rows", "width", "pairs", "weights")


def encode(message: Message, header: Header, sequence_number: int | None = None) -> list[bytes | memoryview]:
    """Returns the frames of a message. Tensor frames are the message's own buffers: do not write to them until they are
    sent. `sequence_number`: in place of the header's."""
    number = header.sequence_number if sequence_number is None else sequence_number
    if isinstance(message, messages.Dispatch):
        pairs, weights = message.routing, message.weights
        assert (pairs.dtype, pairs.shape[:1], len(pairs.shape)) == ("int32", (3,), 2), pairs.shape
        assert (weights.dtype, len(weights.shape)) == ("float32", 1), weights.shape
        sizes = pairs.shape[1], weights.shape[0]
        return _encode_fixed(_DISPATCH, message.call, header, number, message.hidden, sizes, (pairs.data, weights.data))
    if isinstance(message, messages.ExpertRows):
        return _encode_fixed(_ROWS, message.call, header, number, message.rows, (0, 0), ())
    if number != header.sequence_number:
        header = dataclasses.replace(header, sequence_number=number)
    kind = type(message)
    scalars, names = _PLANS[kind]
    tensors: list[TensorFrame] = [getattr(message, name) for name in names]
    frames = _frames_of(tensors)
    body = msgpack.packb(
        {
            "k": _NUMBERS[kind],
            "h": [getattr(header, name) for name in _HEADER_FIELDS],
            "f": {name: getattr(message, name) for name, _ in scalars},
            "t": [(tensor.dtype, tensor.shape) for tensor in tensors],
        }
    )
    prefix = _PREFIX.pack(_MAGIC, PROTOCOL_VERSION, 0, _checksum(body, frames, PROTOCOL_VERSION))
    return [prefix + body, *frames]


def _frames_of(tensors: Sequence[TensorFrame]) -> list[bytes | memoryview]:
    if not tensors:
        return []
    small, large = [], []
    for tensor in tensors:
        num_bytes = len(tensor.data)
        if num_bytes > SMALL_BYTES:
            large.append(tensor.data)
        elif num_bytes:
            small += [tensor.data, bytes(-num_bytes % _ALIGNMENT)]
    return [b"".join(small), *large]


def _encode_fixed(
    kind: int,
    call: int,
    header: Header,
    sequence_number: int,
    rows: TensorFrame,
    sizes: tuple[int, int],
    small: tuple[bytes | memoryview, ...],
) -> list[bytes | memoryview]:
    trace = header.trace.encode()
    head = _HEAD.pack(
        kind,
        len(trace),
        _DTYPE_NUMBERS[rows.dtype],
        0,
        0,
        header.router_term,
        header.generation,
        header.attempt,
        header.step,
        header.layer,
        sequence_number,
        header.time_left_ms,
        call,
        *rows.shape,
        *sizes,
    )
    body = b"".join((head, trace, bytes(-len(trace) % _ALIGNMENT), *small))
    checksum = _checksum(body, (rows.data,), PROTOCOL_VERSION, FIXED)
    return [_PREFIX.pack(_MAGIC, PROTOCOL_VERSION, FIXED, checksum) + body, rows.data]


def decode(frames: Sequence[bytes | memoryview]) -> tuple[Message, Header]:
    """Returns the message that the frames (without routing frames) stand for. Raises ProtocolError, and nothing
    else."""
    if not 1 <= len(frames) <= 1 + MAX_FRAMES:
        raise ProtocolError(f"a message has 1 to {1 + MAX_FRAMES} frames, not {len(frames)}")
    first = memoryview(frames[0])
    if first.nbytes <= _PREFIX.size:
        raise ProtocolError(f"header frame of {first.nbytes} bytes; more than {_PREFIX.size} are needed")
    magic, version, flags, checksum = _PREFIX.unpack_from(first)
    if magic != _MAGIC:
        raise ProtocolError("not a moemesh message (wrong magic)")
    if not OLDEST_VERSION <= version <= PROTOCOL_VERSION:
        understood = " or ".join(map(str, range(OLDEST_VERSION, PROTOCOL_VERSION + 1)))
        raise ProtocolError(f"protocol version {version}; {understood} is understood")
    if flags not in (0, FIXED):
        raise ProtocolError(f"flags {flags}; 0 and {FIXED} are understood")
    most = MAX_FIXED_BYTES if flags == FIXED else MAX_HEADER_BYTES
    if first.nbytes > most:
        raise ProtocolError(f"header frame of {first.nbytes} bytes; at most {most} are allowed")
    body = first[_PREFIX.size :]
    if _checksum(body, frames[1:], version, flags) != checksum:
        raise ProtocolError("checksum does not match: the message was damaged on its way")
    return _decode_fixed(body, frames[1:]) if flags == FIXED else _decode_map(body, frames[1:], version)


def _decode_fixed(body: memoryview, frames: Sequence[bytes | memoryview]) -> tuple[Message, Header]:
    if len(body) < _HEAD.size or len(frames) != 1:
        raise ProtocolError(
            f"fixed places take {_HEAD.size} bytes and a tensor frame; these are {len(body)} and {len(frames)}"
        )
    kind, trace_bytes, dtype_number, *zeros_and_counters = _HEAD.unpack_from(body)
    counters = zeros_and_counters[2:]
    if kind != _DISPATCH and kind != _ROWS:
        raise ProtocolError(f"unknown kind of message {kind} with fixed places")
    name = "Dispatch.hidden" if kind == _DISPATCH else "ExpertRows.rows"
    if dtype_number >= len(_DTYPES) or zeros_and_counters[0] or zeros_and_counters[1]:
        raise ProtocolError(f"{name} has the unknown dtype number {dtype_number}, or no zeros after it")
    if max(counters) >= _INT64:
        _refuse_counters(counters)
    router_term, generation, attempt, step, layer, sequence_number, time_left_ms = counters[:7]
    call, rows, width, pairs, weights = counters[7:]
    first, dtype = memoryview(frames[0]), _DTYPES[dtype_number]
    num_bytes = rows * width * ITEM_BYTES[dtype]
    # An empty array may not claim huge sizes either: numpy and torch fail on them where it is not expected.
    if num_bytes != first.nbytes or max(rows, width) > MAX_ELEMENTS:
        raise ProtocolError(f"{name} of {dtype} {(rows, width)} needs {num_bytes} bytes, not {first.nbytes}")
    trace_end = _HEAD.size + trace_bytes
    routing = trace_end + -trace_bytes % _ALIGNMENT
    routing_end = routing + 12 * pairs
    end = routing_end + 4 * weights
    if len(body) != end or (kind == _ROWS and end != routing):
        raise ProtocolError(
            f"a trace of {trace_bytes} bytes, {pairs} pairs and {weights} weights need {end} bytes, not {len(body)}"
        )
    trace = _decode_trace(body[_HEAD.size : trace_end])
    header = Header(router_term, generation, attempt, step, layer, sequence_number, time_left_ms, trace)
    tensor = TensorFrame(dtype, (rows, width), first)
    if kind == _ROWS:
        return messages.ExpertRows(call, tensor), header
    routing_frame = TensorFrame("int32", (3, pairs), body[routing:routing_end])
    weights_frame = TensorFrame("float32", (weights,), body[routing_end:])
    return messages.Dispatch(call, tensor, routing_frame, weights_frame), header


def _refuse_counters(counters: Sequence[int]) -> NoReturn:
    name, value = next((name, value) for name, value in zip(_COUNTERS, counters, strict=True) if value >= _INT64)
    raise ProtocolError(f"header field {name} must be a whole number from 0 to 2^63, not {value}")


def _decode_trace(encoded: memoryview) -> str:
    try:
        trace = str(encoded, "utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("header field trace must be UTF-8") from None
    if len(trace) > MAX_TRACE:
        raise ProtocolError(f"header field trace must be a string of at most {MAX_TRACE} characters")
    return trace


def _decode_map(body: memoryview, frames: Sequence[bytes | memoryview], version: int) -> tuple[Message, Header]:
    try:
        fields = msgpack.unpackb(
            body,
            strict_map_key=True,
            use_list=False,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_bin_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"header is not msgpack: {error}") from None
    if not isinstance(fields, dict) or fields.keys() != {"k", "h", "f", "t"}:
        raise ProtocolError("header must be a map with the keys k, h, f and t")
    kind = _KINDS.get(fields["k"]) if type(fields["k"]) is int else None
    if kind is None:
        raise ProtocolError(f"unknown kind of message {fields['k']!r:.40}")
    defaults = _DEFAULTS[kind] if version < PROTOCOL_VERSION else {}
    values = _decode_fields(kind, fields["f"], defaults)
    values.update(_decode_tensors(kind, fields["t"], frames, defaults))
    return kind(**values), _decode_header(fields["h"])


def _checksum(body: bytes | memoryview, frames: Sequence[bytes | memoryview], version: int, flags: int = 0) -> int:
    digest = xxhash.xxh3_64(body, seed=version | flags << 16)
    for frame in frames:
        digest.update(frame)
    return digest.intdigest()


def _decode_header(values: Any) -> Header:
    if not isinstance(values, tuple) or len(values) != len(_HEADER_FIELDS):
        raise ProtocolError(f"header must have {len(_HEADER_FIELDS)} values")
    for name, value in zip(_HEADER_FIELDS, values, strict=True):
        if name == "trace":
            if not isinstance(value, str) or len(value) > MAX_TRACE:
                raise ProtocolError(f"header field trace must be a string of at most {MAX_TRACE} characters")
        elif not (type(value) is int and 0 <= value < _INT64):
            raise ProtocolError(f"header field {name} must be a whole number from 0 to 2^63, not {value!r:.40}")
    return Header(*values)


def _decode_fields(kind: type[Any], values: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    scalars, _ = _PLANS[kind]
    if defaults and isinstance(values, dict):
        values = {name: defaults[name] for name, _ in scalars if name in defaults} | values
    if not isinstance(values, dict) or values.keys() != _FIELDS[kind]:
        raise ProtocolError(f"{kind.__name__} must have the fields {', '.join(name for name, _ in scalars)}")
    for name, type_name in scalars:
        if not _fits(values[name], type_name):
            raise ProtocolError(f"{kind.__name__}.{name} must be of type {type_name}, not {values[name]!r:.80}")
    return values


def _fits(value: Any, type_name: str) -> bool:
    if type_name == "int":
        return type(value) is int and 0 <= value < _INT64
    if type_name == "float":
        return type(value) is float and math.isfinite(value)
    if type_name == "str":
        return isinstance(value, str)
    if type_name == "bool":
        return isinstance(value, bool)
    if type_name == "strs":
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return _is_ints(value)


def _is_ints(value: Any) -> bool:
    if not isinstance(value, tuple):
        return False
    for item in value:  # a generator would take twice as long, and every tensor's shape comes here
        if not (type(item) is int and 0 <= item < _INT64):
            return False
    return True


def _decode_tensors(
    kind: type[Any], descriptions: Any, frames: Sequence[bytes | memoryview], defaults: dict[str, Any]
) -> dict[str, TensorFrame]:
    _, names = _PLANS[kind]
    if not isinstance(descriptions, tuple):
        raise ProtocolError(f"{kind.__name__} must describe its tensors by dtype and shape")
    added = [name for name in names[len(descriptions) :] if name in defaults] if defaults else []
    names = names[: len(names) - len(added)]
    if len(descriptions) != len(names):
        raise ProtocolError(f"{kind.__name__} must have {len(names)} tensors, not {len(descriptions)}")
    if len(frames) < bool(names):
        raise ProtocolError(f"{kind.__name__} must have a frame for its small tensors")
    tensors = {name: defaults[name] for name in added}
    waiting = iter(frames)
    small, place = memoryview(next(waiting) if names else b""), 0
    for name, description in zip(names, descriptions, strict=True):
        dtype, shape, num_bytes = _described(f"{kind.__name__}.{name}", description)
        if num_bytes <= SMALL_BYTES:
            data, place = small[place : place + num_bytes], place + num_bytes + -num_bytes % _ALIGNMENT
        else:
            data = memoryview(next(waiting, b""))
        if data.nbytes != num_bytes:
            raise ProtocolError(f"{kind.__name__}.{name} of {dtype} {shape} needs {num_bytes} bytes, not {data.nbytes}")
        tensors[name] = TensorFrame(dtype, shape, data)
    if place != small.nbytes or next(waiting, None) is not None:
        raise ProtocolError(f"{kind.__name__} has more bytes than its tensors need")
    return tensors


def _described(name: str, description: Any) -> tuple[str, tuple[int, ...], int]:
    """Returns dtype, shape and bytes. Raises ProtocolError."""
    if not isinstance(description, tuple) or len(description) != 2:
        raise ProtocolError(f"{name} must be described by dtype and shape")
    dtype, shape = description
    item_bytes = ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if item_bytes is None:
        raise ProtocolError(f"{name} has the unknown dtype {dtype!r:.40}")
    if not _is_ints(shape) or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"{name} must have at most {MAX_DIMENSIONS} dimensions")
    elements = math.prod(shape)
    # An empty array may not claim huge sizes either: numpy and torch fail on them where it is not expected.
    if (elements or math.prod(filter(None, shape))) > MAX_ELEMENTS:
        raise ProtocolError(f"{name} of {dtype} {shape} has more than {MAX_ELEMENTS} elements")
    return dtype, shape, elements * item_bytes
