"""The codec: what goes in comes out, and whatever else comes in is a ProtocolError and nothing worse."""

from __future__ import annotations

import dataclasses
import tracemalloc
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.messages import (
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    Dispatch,
    ExpertHeartbeat,
    ExpertRows,
    Failed,
    Header,
    Leave,
    TensorFrame,
)
from common.wire.codec import MAX_FRAMES, MAX_HEADER_BYTES, decode, encode
from tests.support.router.message_strategies import KINDS, headers, messages, messages_of

ROWS = ExpertRows(7, TensorFrame("int32", (2, 1), b"\x01\x00\x00\x00\x02\x00\x00\x00"))


def joined(frames: list[bytes | memoryview]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def packed(fields: Any, frames: tuple[bytes, ...] = (), version: int = PROTOCOL_VERSION, flags: int = 0) -> list[bytes]:
    """Frames whose prefix and checksum are right, whatever the map says."""
    body = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    digest = xxhash.xxh3_64(body, seed=version)
    for frame in frames:
        digest.update(frame)
    prefix = b"MOEM" + version.to_bytes(2, "little") + flags.to_bytes(2, "little")
    return [prefix + digest.intdigest().to_bytes(8, "little") + body, *frames]


def fields_of(message: Any) -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(joined(encode(message, Header()))[0][16:])
    return fields


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_comes_out_as_it_went_in(kind: type[Any]) -> None:
    @settings(max_examples=40, deadline=None)
    @given(message=messages_of(kind), header=headers())
    def check(message: Any, header: Header) -> None:
        decoded, decoded_header = decode(joined(encode(message, header)))
        assert decoded == message
        assert decoded_header == header

    check()


@settings(max_examples=60, deadline=None)
@given(message=messages(), header=headers(), data=st.data())
def test_any_flipped_bit_is_a_protocol_error(message: Any, header: Header, data: st.DataObject) -> None:
    frames = joined(encode(message, header))
    index = data.draw(st.sampled_from([i for i, frame in enumerate(frames) if frame]))
    bit = data.draw(st.integers(0, 8 * len(frames[index]) - 1))
    damaged = bytearray(frames[index])
    damaged[bit // 8] ^= 1 << bit % 8
    frames[index] = bytes(damaged)
    with pytest.raises(ProtocolError):
        decode(frames)


def test_each_single_bit_of_one_message_counts() -> None:
    frames = joined(encode(ROWS, Header(step=3, trace="t")))
    for index, frame in enumerate(frames):
        for bit in range(8 * len(frame)):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ProtocolError):
                decode([*frames[:index], bytes(damaged), *frames[index + 1 :]])


@settings(max_examples=60, deadline=None)
@given(message=messages(), data=st.data())
def test_cut_missing_repeated_and_added_frames_are_protocol_errors(message: Any, data: st.DataObject) -> None:
    frames = joined(encode(message, Header()))
    index = data.draw(st.sampled_from([i for i, frame in enumerate(frames) if frame]))
    cut = data.draw(st.integers(0, len(frames[index]) - 1))
    for damaged in (
        [*frames[:index], frames[index][:cut], *frames[index + 1 :]],
        [*frames[:index], *frames[index + 1 :]],
        [*frames, b""],
        [*frames, data.draw(st.binary(max_size=8))],
        [b"", *frames],
    ):
        with pytest.raises(ProtocolError):
            decode(damaged)


@settings(deadline=None)
@given(frames=st.lists(st.binary(max_size=80), max_size=20))
def test_random_bytes_are_protocol_errors(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(frames)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(
    fields=st.fixed_dictionaries({"k": st.integers(-1, 40) | _VALUES, "h": _VALUES, "f": _VALUES, "t": _VALUES})
    | _VALUES,
    frames=st.lists(st.binary(max_size=8), max_size=2),
)
def test_any_map_with_a_right_checksum_is_a_message_or_a_protocol_error(fields: Any, frames: list[bytes]) -> None:
    try:
        decode(packed(fields, tuple(frames)))
    except ProtocolError:
        return
    raise AssertionError("nothing of that shape is a message")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_field_of_another_type_is_a_protocol_error_or_still_a_message(data: st.DataObject) -> None:
    message = data.draw(messages())
    frames = joined(encode(message, Header()))
    fields = fields_of(message)
    part = data.draw(st.sampled_from([key for key in "hft" if fields[key]]))
    place = data.draw(st.sampled_from(sorted(fields[part]) if part == "f" else range(len(fields[part]))))
    fields[part][place] = data.draw(_VALUES)
    try:
        decoded, header = decode(packed(fields, tuple(frames[1:])))
    except ProtocolError:
        return
    assert joined(encode(decoded, header))[1:] == frames[1:]


def test_bytes_that_are_not_msgpack_are_a_protocol_error() -> None:
    for body in (b"\xc1", b"\x81", b"\xff" * 20, b"\x93\x01", b"\xa5\xff\xff\xff\xff\xff", b"\xd6\xff\x00\x00\x00\x00"):
        with pytest.raises(ProtocolError):
            decode(packed(body))


def test_deep_nesting_is_a_protocol_error() -> None:
    for opening in (b"\x91", b"\x81\xa1a"):
        with pytest.raises(ProtocolError):
            decode(packed(opening * 100_000))


@pytest.mark.parametrize("version", [0, OLDEST_VERSION - 1, PROTOCOL_VERSION + 1, 65535])
def test_versions_that_are_not_understood_are_named(version: int) -> None:
    with pytest.raises(ProtocolError, match=f"version {version}"):
        decode(packed(fields_of(ROWS), (bytes(ROWS.rows.data),), version=version))


@pytest.fixture
def understands_the_version_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a version that has only added fields."""
    monkeypatch.setattr("common.wire.codec.OLDEST_VERSION", PROTOCOL_VERSION - 1)


def as_version_before(message: Any, header: Header) -> list[bytes]:
    """As a process sends it that knows no field with a default."""
    fields = fields_of(message)
    added = {f.name for f in dataclasses.fields(message) if f.default is not dataclasses.MISSING}
    names = [f.name for f in dataclasses.fields(message) if isinstance(getattr(message, f.name), TensorFrame)]
    old = [index for index, name in enumerate(names) if name not in added]
    frames = joined(encode(message, header))[1:]
    scalars = {name: value for name, value in fields["f"].items() if name not in added}
    return packed(
        fields | {"f": scalars, "t": [fields["t"][index] for index in old]},
        tuple(frames[index] for index in old),
        version=PROTOCOL_VERSION - 1,
    )


@pytest.mark.usefixtures("understands_the_version_before")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_the_version_before_did_not_have_gets_its_default(kind: type[Any]) -> None:
    @settings(max_examples=10, deadline=None)
    @given(message=messages_of(kind))
    def check(message: Any) -> None:
        added = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
        assert decode(as_version_before(message, Header()))[0] == replace(message, **added)

    check()


@pytest.mark.usefixtures("understands_the_version_before")
def test_of_the_own_version_a_field_that_is_missing_is_refused() -> None:
    fields = fields_of(Failed("code", "message", 3))
    del fields["f"]["call"]
    assert decode(packed(fields, version=PROTOCOL_VERSION - 1))[0] == Failed("code", "message", 0)
    with pytest.raises(ProtocolError, match="Failed must have the fields code, message, call"):
        decode(packed(fields))


def test_a_version_whose_fields_were_taken_away_is_refused() -> None:
    with pytest.raises(ProtocolError, match="protocol version 4; 5 is understood"):
        decode(packed(fields_of(Leave("stopped")), version=4))


def test_flags_of_a_later_version_are_refused() -> None:
    with pytest.raises(ProtocolError):
        decode(packed(fields_of(ROWS), (bytes(ROWS.rows.data),), flags=1))


@pytest.mark.parametrize("kind", [0, 99, True, None, "Hello", 1.0])
def test_unknown_kinds_are_refused(kind: Any) -> None:
    with pytest.raises(ProtocolError, match="unknown kind"):
        decode(packed(fields_of(Leave("x")) | {"k": kind}))


@pytest.mark.parametrize(
    "field", [{"call": -1}, {"call": 2**63}, {"call": True}, {"call": 1.0}, {"call": "1"}, {"call": None}, {"more": 1}]
)
def test_a_whole_number_is_a_whole_number_within_63_bits(field: dict[str, Any]) -> None:
    fields = fields_of(Failed("code", "message"))
    with pytest.raises(ProtocolError, match="Failed"):
        decode(packed(fields | {"f": fields["f"] | field}))


@pytest.mark.parametrize("value", [-1, 2**63, True, 1.0, "1", None])
def test_so_is_a_counter_of_the_header(value: object) -> None:
    fields = fields_of(Leave(""))
    with pytest.raises(ProtocolError, match="header field router_term"):
        decode(packed(fields | {"h": (value, *fields["h"][1:])}))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1])
def test_times_are_finite_floats(number: float) -> None:
    fields = fields_of(ExpertHeartbeat())
    with pytest.raises(ProtocolError, match=r"ExpertHeartbeat\.queue_seconds"):
        decode(packed(fields | {"f": fields["f"] | {"queue_seconds": number}}))


def test_a_long_trace_is_refused() -> None:
    with pytest.raises(ProtocolError, match="trace"):
        decode(joined(encode(Leave(""), Header(trace="x" * 129))))


@pytest.mark.parametrize(
    "tensor",
    [
        ("int32", (2, 2)),
        ("int64", (2, 1)),
        ("int33", (2, 1)),
        ("int32", (2, 1, 1, 1, 1)),
        ("int32", (-2, -1)),
        ("int32", (2**62, 2**62, 0)),
        ("int32", (2**40,)),
        ("int32", (True, 2)),
        ("int32", 2),
        ("int32",),
        (3, (2, 1)),
    ],
)
def test_a_tensor_that_is_not_what_its_frame_holds_is_refused(tensor: Any) -> None:
    fields = fields_of(ROWS)
    with pytest.raises(ProtocolError, match=r"ExpertRows\.rows"):
        decode(packed(fields | {"t": [tensor]}, (bytes(ROWS.rows.data),)))


@pytest.mark.parametrize("shape", [(0, 2**62), (2**62, 0), (0, 2**31, 2**31, 2**31)])
def test_an_empty_tensor_cannot_claim_sizes_that_nothing_can_hold(shape: tuple[int, ...]) -> None:
    """numpy and torch raise on such a shape, long after it was let in."""
    fields = fields_of(ROWS)
    with pytest.raises(ProtocolError, match="rows"):
        decode(packed(fields | {"t": [("int32", shape)]}, (b"",)))


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\x7f\xff\xff\xff",  # an array of 2^31 entries
        b"\xdf\x7f\xff\xff\xff",  # a map
        b"\xdb\x7f\xff\xff\xff",  # a string
        b"\xc6\x7f\xff\xff\xff",  # bytes
        b"\xc9\x7f\xff\xff\xff\x05",  # an extension
        b"\xdd\x00\x01\x00\x00" * 400 + b"\x00" * 70_000,  # arrays in arrays, each of which could be there alone
        b"\xdd\x00\x00\x1f\xff" * 400 + b"\x00" * 70_000,
    ],
)
def test_claimed_sizes_allocate_nothing(body: bytes) -> None:
    frames = packed(body)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(frames)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_too_many_frames_and_too_large_headers_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ProtocolError, match="frames"):
        decode([b""] * (MAX_FRAMES + 2))
    with pytest.raises(ProtocolError, match="header frame"):
        decode([bytes(MAX_HEADER_BYTES + 1)])


def test_frames_are_not_copied() -> None:
    data = bytearray(b"\x01\x00\x00\x00")
    frames = encode(ExpertRows(1, TensorFrame("int32", (1,), memoryview(data))), Header())
    message, _ = decode(frames)
    assert isinstance(message, ExpertRows)
    data[0] = 2
    assert message.rows.data[0] == 2


def test_two_messages_whose_frames_are_swapped_are_refused() -> None:
    frame = TensorFrame("int32", (3, 1), bytes(12))
    dispatch = Dispatch(1, frame, replace(frame, data=bytes(range(12))), frame)
    first, hidden, routing, weights = joined(encode(dispatch, Header()))
    with pytest.raises(ProtocolError, match="checksum"):
        decode([first, routing, hidden, weights])
