from __future__ import annotations

import random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.proxy.zmtp_frames import (
    GREETING_BYTES,
    Damage,
    FrameDamage,
    FrameRule,
    Message,
    ZmtpStream,
    corrupt,
    truncate,
    write_message,
)

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(GREETING_BYTES - 16)
payloads = st.one_of(st.binary(max_size=20), st.integers(250, 600).map(bytes))
messages = st.lists(payloads, min_size=1, max_size=4).map(tuple)
commands = st.binary(max_size=40).map(lambda body: bytes([4, len(body)]) + body)
passages = st.lists(st.one_of(messages, commands), max_size=8)


def stream_of(parts: list[Message | bytes]) -> bytes:
    return GREETING + b"".join(part if isinstance(part, bytes) else write_message(part) for part in parts)


@settings(deadline=None)
@given(passages, st.randoms(use_true_random=False))
def test_a_stream_cut_anywhere_gives_back_its_messages_and_its_bytes(
    parts: list[Message | bytes], draw: random.Random
) -> None:
    data = stream_of(parts)
    stream, found, position = ZmtpStream(), [], 0
    while position < len(data):
        stop = position + draw.randint(1, 90)
        found += stream.feed(data[position:stop])
        position = stop
    assert b"".join(passage.raw for passage in found) == data
    assert [passage.message for passage in found if passage.message] == [p for p in parts if isinstance(p, tuple)]
    assert stream.rest() == b""


@settings(deadline=None)
@given(passages, st.integers(1, 60))
def test_what_is_unfinished_waits_and_is_not_lost(parts: list[Message | bytes], missing: int) -> None:
    data = stream_of(parts)[:-missing]
    stream = ZmtpStream()
    passed = b"".join(passage.raw for passage in stream.feed(data))
    assert passed + stream.rest() == data


def test_a_frame_too_long_to_be_one_is_passed_on_as_it_is() -> None:
    stream = ZmtpStream(max_frame_bytes=1000)
    data = GREETING + b"\x02" + (1 << 40).to_bytes(8, "big") + b"rest"
    assert b"".join(passage.raw for passage in stream.feed(data) + stream.feed(b"more")) == data + b"more"


@settings(deadline=None)
@given(messages, st.randoms(use_true_random=False))
def test_corruption_flips_exactly_one_bit_and_keeps_the_lengths(message: Message, draw: random.Random) -> None:
    damaged = corrupt(message, draw)
    assert [len(frame) for frame in damaged] == [len(frame) for frame in message]
    flipped = sum(
        (one ^ other).bit_count()
        for frame, before in zip(damaged, message, strict=True)
        for one, other in zip(frame, before, strict=True)
    )
    assert flipped == (1 if any(message) else 0)


@settings(deadline=None)
@given(messages, st.randoms(use_true_random=False))
def test_truncation_shortens_the_last_frame_that_has_bytes(message: Message, draw: random.Random) -> None:
    damaged = truncate(message, draw)
    assert len(damaged) == len(message)
    assert b"".join(message).startswith(b"".join(damaged))
    assert sum(map(len, damaged)) < sum(map(len, message)) or not any(message)


@settings(deadline=None)
@given(st.lists(messages, max_size=12), st.integers())
def test_reordering_loses_and_doubles_nothing(sent: list[Message], seed: int) -> None:
    damage = FrameDamage(FrameRule("reorder", 0.5, seed))
    arrived = [message for one in sent for message in damage.pass_on(one)] + damage.release()
    assert sorted(arrived) == sorted(sent)
    assert damage.release() == []


def test_two_messages_change_places() -> None:
    damage = FrameDamage(FrameRule("reorder", 1.0, 0))
    assert damage.pass_on((b"first",)) == []
    assert damage.pass_on((b"second",)) == [(b"second",), (b"first",)]


def test_a_replayed_message_arrives_twice_and_a_lost_one_never() -> None:
    assert FrameDamage(FrameRule("replay", 1.0, 0)).pass_on((b"a", b"b")) == [(b"a", b"b")] * 2
    assert FrameDamage(FrameRule("lose", 1.0, 0)).pass_on((b"a",)) == []


@pytest.mark.parametrize("kind", get_args(Damage))
def test_the_same_seed_damages_the_same_messages_in_the_same_way(kind: Damage) -> None:
    sent = [(bytes([number]) * 9,) for number in range(50)]
    runs = []
    for _ in range(2):
        damage = FrameDamage(FrameRule(kind, 0.3, 7))
        runs.append([result for message in sent for result in damage.pass_on(message)])
    run = runs[0]
    assert run == runs[1]
    assert run != sent
    if kind == "replay":
        assert len(sent) < len(run) < 2 * len(sent), "some twice, not all"
    elif kind == "reorder":
        assert any(arrived == message for arrived, message in zip(run, sent, strict=False)), "some in their places"
    else:
        assert set(run) & set(sent)
