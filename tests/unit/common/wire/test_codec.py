"""The codec: what goes in comes out, and whatever else comes in is a ProtocolError and nothing worse."""

from __future__ import annotations

import dataclasses
import struct
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
    AssignShards,
    Dispatch,
    ExpertHeartbeat,
    ExpertRows,
    Failed,
    Header,
    Leave,
    Step,
    StepResult,
    TensorFrame,
)
from common.wire.codec import FIXED, MAX_FIXED_BYTES, MAX_FRAMES, MAX_HEADER_BYTES, decode, encode
from tests.support.router.message_strategies import FIXED_KINDS, KINDS, headers, messages, messages_of

SHARDS = AssignShards(7, TensorFrame("int32", (2, 1), b"\x01\x00\x00\x00\x02\x00\x00\x00"))
ROWS = ExpertRows(7, SHARDS.shards)
MAP_KINDS = [kind for kind in KINDS if kind not in FIXED_KINDS]
"""Those that are told as a map."""


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


@pytest.mark.parametrize("message", [SHARDS, ROWS], ids=["map", "fixed"])
def test_each_single_bit_of_one_message_counts(message: Any) -> None:
    frames = joined(encode(message, Header(step=3, trace="t")))
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
    message = data.draw(st.sampled_from(MAP_KINDS).flatmap(messages_of))
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
        decode(packed(fields_of(SHARDS), (bytes(SHARDS.shards.data),), version=version))


@pytest.fixture
def understands_the_version_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a version that has only added fields."""
    monkeypatch.setattr("common.wire.codec.OLDEST_VERSION", PROTOCOL_VERSION - 1)


def frames_of(tensors: list[bytes]) -> tuple[bytes, ...]:
    """One for those of up to 4 KiB, each padded to eight bytes, and one for each other."""
    if not tensors:
        return ()
    small = b"".join(tensor + bytes(-len(tensor) % 8) for tensor in tensors if len(tensor) <= 4096)
    return (small, *(tensor for tensor in tensors if len(tensor) > 4096))


@pytest.mark.parametrize("sizes", [(), (0,), (3, 0, 8), (4096, 4097, 1), (5000, 6000)])
def test_small_tensors_share_a_frame_and_large_ones_have_their_own(sizes: tuple[int, ...]) -> None:
    filled = [TensorFrame("uint8", (size,), bytes([1 + place]) * size) for place, size in enumerate(sizes)]
    empty = TensorFrame("uint8", (0,), b"")
    tensors = [*filled, *[empty] * (6 - len(filled))]
    hidden, sequences, new_blocks, released, sampling, seeds = tensors
    message = Step(hidden, sequences, new_blocks, released, sampling, seeds)
    frames = joined(encode(message, Header()))
    assert tuple(frames[1:]) == frames_of([bytes(tensor.data) for tensor in tensors])
    assert decode(frames)[0] == message


def as_version_before(message: Any, header: Header) -> list[bytes]:
    """As a process sends it that knows no field with a default."""
    fields = fields_of(message)
    added = {f.name for f in dataclasses.fields(message) if f.default is not dataclasses.MISSING}
    names = [f.name for f in dataclasses.fields(message) if isinstance(getattr(message, f.name), TensorFrame)]
    old = [index for index, name in enumerate(names) if name not in added]
    scalars = {name: value for name, value in fields["f"].items() if name not in added}
    return packed(
        fields | {"f": scalars, "t": [fields["t"][index] for index in old]},
        frames_of([bytes(getattr(message, names[index]).data) for index in old]),
        version=PROTOCOL_VERSION - 1,
    )


@pytest.mark.usefixtures("understands_the_version_before")
@pytest.mark.parametrize("kind", MAP_KINDS, ids=lambda kind: kind.__name__)
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
    with pytest.raises(ProtocolError, match="protocol version 8; 9 is understood"):
        decode(packed(fields_of(Leave("stopped")), version=8))


@pytest.mark.parametrize("flags", [1, 2, 3, 65535])
def test_flags_of_a_later_version_and_those_of_another_form_are_refused(flags: int) -> None:
    with pytest.raises(ProtocolError):
        decode(packed(fields_of(SHARDS), (bytes(SHARDS.shards.data),), flags=flags))


@pytest.mark.parametrize("kind", [0, 30, 31, 99, True, None, "Hello", 1.0])
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
    fields = fields_of(SHARDS)
    with pytest.raises(ProtocolError, match=r"AssignShards\.shards"):
        decode(packed(fields | {"t": [tensor]}, (bytes(SHARDS.shards.data),)))


@pytest.mark.parametrize("shape", [(0, 2**62), (2**62, 0), (0, 2**31, 2**31, 2**31)])
def test_an_empty_tensor_cannot_claim_sizes_that_nothing_can_hold(shape: tuple[int, ...]) -> None:
    """numpy and torch raise on such a shape, long after it was let in."""
    fields = fields_of(SHARDS)
    with pytest.raises(ProtocolError, match="shards"):
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


def test_too_many_frames_and_too_large_headers_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ProtocolError, match="frames"):
        decode([b""] * (MAX_FRAMES + 2))
    for flags, most in ((0, MAX_HEADER_BYTES), (FIXED, MAX_FIXED_BYTES)):
        monkeypatch.setattr("common.wire.codec._checksum", None)  # it would be read for that
        with pytest.raises(ProtocolError, match=f"at most {most}"):
            decode([struct.pack("<4sHHQ", b"MOEM", PROTOCOL_VERSION, flags, 0) + bytes(most)])


def test_a_call_of_very_many_pairs_comes_through() -> None:
    pairs = 400_000
    routing = TensorFrame("int32", (3, pairs), bytes(12 * pairs))
    message = Dispatch(1, TensorFrame("bfloat16", (1, 1), bytes(2)), routing, TensorFrame("float32", (0,), b""))
    assert decode(joined(encode(message, Header())))[0] == message


def test_frames_are_not_copied() -> None:
    data = bytearray(b"\x01\x00\x00\x00")
    frames = encode(ExpertRows(1, TensorFrame("int32", (1, 1), memoryview(data))), Header())
    message, _ = decode(frames)
    assert isinstance(message, ExpertRows)
    data[0] = 2
    assert message.rows.data[0] == 2


def test_a_message_whose_frames_are_swapped_is_refused() -> None:
    large = TensorFrame("int32", (2000,), bytes(8000))
    message = result_of(large, replace(large, data=b"1234" * 2000))
    first, small, sequence_ids, token_ids = joined(encode(message, Header()))
    with pytest.raises(ProtocolError, match="checksum"):
        decode([first, small, token_ids, sequence_ids])


def result_of(sequence_ids: TensorFrame, token_ids: TensorFrame) -> StepResult:
    frame = TensorFrame("int32", (1,), bytes(4))
    return StepResult(sequence_ids, token_ids, frame, frame, frame)


# ---- the form with fixed places

DISPATCH = Dispatch(
    9,
    TensorFrame("bfloat16", (2, 3), bytes(range(12))),
    TensorFrame("int32", (3, 2), bytes(range(24))),
    TensorFrame("float32", (1,), b"abcd"),
)
HEADER = Header(1, 2, 3, 4, 5, 6, 7, "0/4")
PLACES = ("router_term", "generation", "attempt", "step", "layer", "sequence_number", "time_left_ms", "call")


def fixed(head: bytes, rest: bytes, frames: list[bytes], flags: int = FIXED) -> list[bytes]:
    """Frames whose prefix and checksum are right, whatever the places hold."""
    digest = xxhash.xxh3_64(head + rest, seed=PROTOCOL_VERSION | flags << 16)
    for frame in frames:
        digest.update(frame)
    prefix = b"MOEM" + PROTOCOL_VERSION.to_bytes(2, "little") + flags.to_bytes(2, "little")
    return [prefix + digest.intdigest().to_bytes(8, "little") + head + rest, *frames]


def changed(message: Any, place: int, value: bytes) -> list[bytes]:
    """The message with other bytes from this place on, counted from the end of the prefix."""
    first, *frames = joined(encode(message, HEADER))
    body = bytearray(first[16:])
    body[place : place + len(value)] = value
    return fixed(bytes(body[:104]), bytes(body[104:]), frames)


def test_the_places_are_those_of_the_protocol() -> None:
    first, hidden = joined(encode(DISPATCH, HEADER))
    head = struct.pack("<HHBBH12Q", 30, 3, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7, 9, 2, 3, 2, 1)
    assert [first, hidden] == fixed(head, b"0/4" + bytes(5) + bytes(range(24)) + b"abcd", [bytes(range(12))])
    assert joined(encode(ROWS, HEADER)) == fixed(
        struct.pack("<HHBBH12Q", 31, 3, 5, 0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 2, 1, 0, 0),
        b"0/4" + bytes(5),
        [bytes(ROWS.rows.data)],
    )


@settings(max_examples=300, deadline=None)
@given(
    message=st.sampled_from(sorted(FIXED_KINDS, key=str)).flatmap(messages_of),
    header=headers(),
    place=st.integers(0, 300),
    value=st.binary(min_size=1, max_size=8),
)
def test_other_bytes_under_a_right_checksum_are_a_message_or_a_protocol_error(
    message: Any, header: Header, place: int, value: bytes
) -> None:
    first, *frames = joined(encode(message, header))
    body = bytearray(first[16:])
    body[place : place + len(value)] = value
    damaged = fixed(bytes(body[:104]), bytes(body[104:]), frames)
    try:
        decoded, decoded_header = decode(damaged)
    except ProtocolError:
        return
    again = joined(encode(decoded, decoded_header))
    assert len(again[0]) == len(damaged[0])
    assert again[1:] == frames


@pytest.mark.parametrize("place", range(8))
def test_a_counter_beyond_63_bits_is_named(place: int) -> None:
    with pytest.raises(ProtocolError, match=f"header field {PLACES[place]} must be a whole number"):
        decode(changed(DISPATCH, 8 + 8 * place, (2**63).to_bytes(8, "little")))


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (0, b"\x20\x00", "unknown kind of message 32"),
        (0, b"\x00\x00", "unknown kind of message 0"),
        (4, b"\x07", "Dispatch.hidden has the unknown dtype number 7"),
        (5, b"\x01", "Dispatch.hidden has the unknown dtype number 2, or no zeros"),
        (7, b"\x01", "Dispatch.hidden has the unknown dtype number 2, or no zeros"),
        (72, b"\x03", r"Dispatch.hidden of bfloat16 \(3, 3\) needs 18 bytes, not 12"),
        (80, (2**40).to_bytes(8, "little"), "Dispatch.hidden of bfloat16"),
        (88, b"\x03", "3 pairs and 1 weights need"),
        (96, b"\x02", "2 pairs and 2 weights need"),
        (2, b"\x0b", "a trace of 11 bytes"),
        (104, b"\xff", "header field trace must be UTF-8"),
    ],
)
def test_what_does_not_fit_its_place_is_named(place: int, value: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        decode(changed(DISPATCH, place, value))


def test_an_answer_has_neither_pairs_nor_weights() -> None:
    first, *frames = joined(encode(ROWS, HEADER))
    head = bytearray(first[16:120])
    head[96] = 1
    with pytest.raises(ProtocolError, match="0 pairs and 1 weights need"):
        decode(fixed(bytes(head), first[120:] + bytes(4), frames))


@pytest.mark.parametrize("sizes", [(0, 2**32), (2**62, 0)])
def test_no_rows_cannot_claim_sizes_that_nothing_can_hold(sizes: tuple[int, int]) -> None:
    empty = ExpertRows(7, TensorFrame("int32", (0, 0), b""))
    with pytest.raises(ProtocolError, match=r"ExpertRows\.rows of int32"):
        decode(changed(empty, 72, b"".join(size.to_bytes(8, "little") for size in sizes)))


def test_a_long_trace_is_refused_of_these_kinds_too() -> None:
    with pytest.raises(ProtocolError, match="trace must be a string of at most 128"):
        decode(joined(encode(ROWS, Header(trace="x" * 129))))


def test_fewer_bytes_than_the_places_take_are_refused() -> None:
    with pytest.raises(ProtocolError, match="fixed places take 104 bytes"):
        decode(fixed(bytes(103), b"", [b""]))
    with pytest.raises(ProtocolError, match="and a tensor frame; these are 104 and 2"):
        decode(fixed(bytes(104), b"", [b"", b""]))


@pytest.mark.parametrize("message", [SHARDS, DISPATCH], ids=["map", "fixed"])
def test_a_sequence_number_may_be_told_apart_from_the_header(message: Any) -> None:
    assert decode(joined(encode(message, HEADER, 77)))[1] == replace(HEADER, sequence_number=77)
