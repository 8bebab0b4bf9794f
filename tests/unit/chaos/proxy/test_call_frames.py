"""Frames of calls between native code, as native code makes them, are told from all that the codec makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.proxy.call_frames import call_frame
from common.compute.native_library import NativeKernels
from common.messages import Header
from common.wire.codec import encode
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.ring_nodes import ALL, RingMesh, kernels
from tests.support.router.message_strategies import headers, messages

__all__ = ["kernels", "one_torch_thread"]


def test_a_question_and_its_answer_are_known_and_what_has_no_rows_is_neither(
    tmp_path: Path, kernels: NativeKernels
) -> None:
    mesh = RingMesh(tmp_path, kernels, {"a": ALL}, linked=("a",), idle=("a",))
    asker = mesh.real.context.socket(zmq.DEALER)
    try:
        mesh.open_rings()
        mesh.start(mesh.call(8))
        _, question = mesh.links["a"].raw.recv_multipart()
        mesh.client.abandon()
        _, cancel = mesh.links["a"].raw.recv_multipart()
        mesh.wake("a")
        asker.connect(mesh.links["a"].endpoints[0])
        asker.send(question)
        answer = asker.recv()
        asker.send(question[:-1] + bytes([question[-1] ^ 1]))
        refusal = asker.recv()
    finally:
        asker.close(linger=0)
        mesh.close()
    assert [call_frame((frame,)) for frame in (question, answer)] == ["question", "answer"]
    assert [call_frame((frame,)) for frame in (cancel, refusal)] == [None, None]
    assert call_frame((question, answer)) is None


@settings(max_examples=200, deadline=None)
@given(message=messages(), header=headers())
def test_no_message_of_the_codec_is_taken_for_a_call(message: Any, header: Header) -> None:
    assert call_frame(tuple(bytes(frame) for frame in encode(message, header))) is None


@given(frames=st.lists(st.binary(max_size=200), max_size=3))
def test_any_bytes_are_looked_at_without_an_error(frames: list[bytes]) -> None:
    assert call_frame(tuple(frames)) in (None, "question", "answer")
