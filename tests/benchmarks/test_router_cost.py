"""The null mesh answers what a step asks for, and tokens of it are text that clients get."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.messages import Step
from common.wire.array import array_to_frame, frame_to_array
from common.wire.records import SAMPLING, SEED, STEP_SEQUENCE, records_to_frame
from compose.tiny_checkpoint import write_tiny_checkpoint
from services.router.front.text.tokenizer import TextTokenizer
from tests.benchmarks.null_stage import FIRST_TOKEN, NUM_TOKENS, result_of
from tests.benchmarks.router_cost import request_bytes


def step_of(*sequences: tuple[int, int], drafts: Sequence[int] = ()) -> Step:
    """Sequences by number, and how many rows of each sample; all but one of these are behind drafts."""
    empty = array_to_frame(np.zeros(0, dtype=np.int64))
    return Step(
        hidden=array_to_frame(np.zeros(len(sequences), dtype=np.int32)),
        sequences=records_to_frame([(number, 0, 1, 0, 1, samples) for number, samples in sequences], STEP_SEQUENCE),
        new_blocks=array_to_frame(np.zeros(len(sequences), dtype=np.int32)),
        released=empty,
        sampling=records_to_frame([], SAMPLING),
        seeds=records_to_frame([], SEED),
        drafts=array_to_frame(np.array(drafts, dtype=np.int32)),
    )


def test_only_sequences_that_sample_get_a_token() -> None:
    result = result_of(step_of((7, 1), (8, 0), (9, 1)), number=3)
    assert frame_to_array(result.sequence_ids, "int64", (None,), "ids").tolist() == [7, 9]
    assert frame_to_array(result.token_ids, "int32", (None,), "tokens").tolist() == [FIRST_TOKEN + 3] * 2


def test_no_draft_is_right_there() -> None:
    token = FIRST_TOKEN + 3
    drafts = [token, token, token + 1, token, token]
    result = result_of(step_of((7, 3), (8, 2), (9, 0), (10, 1), (11, 3), drafts=drafts), number=3)
    assert frame_to_array(result.sequence_ids, "int64", (None,), "ids").tolist() == [7, 8, 10, 11]
    assert frame_to_array(result.token_ids, "int32", (None,), "tokens").tolist() == [token + 1, token, token, token + 1]


def test_each_token_of_the_null_mesh_is_text(tmp_path: Path) -> None:
    vocabulary = TextTokenizer.from_directory(write_tiny_checkpoint(tmp_path / "tiny")).vocabulary
    tokens = range(FIRST_TOKEN, FIRST_TOKEN + NUM_TOKENS + 1)
    assert all(vocabulary.is_text(token) and vocabulary.token_bytes(token) for token in tokens)


def test_a_request_announces_its_body() -> None:
    head, _, body = request_bytes("127.0.0.1:80", 5).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
