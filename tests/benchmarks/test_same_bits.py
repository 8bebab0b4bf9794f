"""How answers are hashed and compared, with answers that are made up."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from services.router.front.text.tokenizer import TextTokenizer
from tests.benchmarks.bit_requests import FIELDS, NUM_REQUESTS, SMALLEST_VOCABULARY, BitRequest, bit_requests
from tests.benchmarks.same_bits import Answer, Meshes, answer_of, compare, hash_of, main, messages_of
from tests.support.front.front_over_engine import TEXT, Server, run


def piece(index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, **fields}]}


def logprobs(*values: float) -> dict[str, Any]:
    return {"token_logprobs": list(values), "top_logprobs": [{"a": value, "b": -9999.0} for value in values]}


def numbers_in(value: Any) -> list[int]:
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, int) else []


def meshes(*token_ids: int, logprob: float = -0.5) -> Meshes:
    answer = answer_of([piece(token_ids=list(token_ids), logprobs=logprobs(logprob), text="a", finish_reason="stop")])
    return {"tiny, PP 1": {"hash": "", "model_hash": "same", "answers": {"00 greedy": answer}}}


def test_requests_are_the_same_every_time_and_each_way_to_sample_has_four() -> None:
    requests = bit_requests()
    assert requests == bit_requests()
    assert len({request.name for request in requests}) == len(requests) == NUM_REQUESTS == 4 * len(FIELDS)
    assert {request.body["max_tokens"] for request in requests} == {24, 32, 40, 48}


def test_what_is_sampled_has_a_seed_and_every_prompt_fits_every_model() -> None:
    for request in bit_requests():
        assert request.body["temperature"] == 0 or "seed" in request.body
        assert max(numbers_in(request.body.get("prompt")), default=0) < SMALLEST_VOCABULARY


def test_floats_count_by_their_bits() -> None:
    assert hash_of([0.1]) == hash_of(json.loads("[1.0e-1]"))
    assert hash_of([0.1]) != hash_of([math.nextafter(0.1, 1)])
    assert hash_of([0.0]) != hash_of([-0.0])


def test_how_a_stream_is_cut_up_does_not_count() -> None:
    whole = piece(
        prompt_token_ids=[9], token_ids=[1, 2, 3], logprobs=logprobs(-1.0, -2.0, -3.0), text="abc", finish_reason="stop"
    )
    pieces = [
        piece(prompt_token_ids=[9], token_ids=[], text="", logprobs=None),
        piece(token_ids=[1, 2], text="ab", logprobs=logprobs(-1.0, -2.0), finish_reason=None),
        piece(token_ids=[3], text="c", logprobs=logprobs(-3.0), finish_reason="stop"),
    ]
    assert answer_of(pieces) == answer_of([whole])


def test_the_front_takes_each_request_and_streams_what_it_says_otherwise(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.from_directory(write_tiny_checkpoint(tmp_path / "tiny"))
    script = tokenizer.encode(f"{TEXT} more of it " * 4)

    async def answer(request: BitRequest, stream: bool) -> Answer:
        reply = await Server(tokenizer, script=[*script]).post(request.path, **(request.body | {"stream": stream}))
        return answer_of(messages_of(reply.body.decode(), stream))

    async def ask_each() -> None:
        for request in bit_requests():
            assert await answer(request, stream=True) == await answer(request, stream=False), request.name

    run(ask_each())


def test_chats_have_their_text_elsewhere() -> None:
    whole = answer_of([piece(token_ids=[1], message={"content": "hi"}, finish_reason="stop")])
    pieces = [
        piece(delta={"role": "assistant", "content": ""}),
        piece(token_ids=[1], delta={"content": "hi"}),
        piece(delta={}, finish_reason="stop"),
    ]
    assert answer_of(pieces) == whole
    assert whole != answer_of([piece(token_ids=[1], message={"content": "ho"}, finish_reason="stop")])


def test_choices_that_come_mixed_up_are_put_in_order() -> None:
    mixed = [piece(1, token_ids=[5], text="e"), piece(0, token_ids=[4], text="d"), piece(1, token_ids=[6], text="f")]
    assert answer_of(mixed)["token_ids"] == [[4], [5, 6]]


def test_a_stream_must_end_with_done() -> None:
    stream = 'data: {"choices": []}\n\n: keep-alive\n\ndata: [DONE]\n\n'
    assert messages_of(stream, is_stream=True) == [{"choices": []}]
    with pytest.raises(RuntimeError, match="broke off"):
        messages_of(stream.removesuffix("data: [DONE]\n\n"), is_stream=True)
    with pytest.raises(RuntimeError, match="with an error"):
        messages_of('data: {"error": "lost"}\n\n' + stream, is_stream=True)


def test_equal_answers_have_no_difference() -> None:
    assert compare(meshes(1, 2), copy.deepcopy(meshes(1, 2))) == []


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (meshes(1, 3), "tokens of choice 0 differ at token 1"),
        (meshes(1), "tokens of choice 0 differ in length, 2 and 1"),
        (meshes(1, 2, logprob=math.nextafter(-0.5, 0)), "logprobs differ"),
    ],
)
def test_each_request_that_differs_is_named_with_what_differs(after: Meshes, words: str) -> None:
    assert compare(meshes(1, 2), after) == [f"tiny, PP 1: 00 greedy: {words}"]


def test_what_cannot_be_compared_is_no_success() -> None:
    other_model, other_requests = meshes(1), meshes(1)
    other_model["tiny, PP 1"]["model_hash"] = "another"
    other_requests["tiny, PP 1"]["answers"] = {"00 sampled": other_requests["tiny, PP 1"]["answers"]["00 greedy"]}
    assert compare({}, meshes(1)) == ["tiny, PP 1: not in the file to compare with"]
    assert "checkpoints differ" in compare(meshes(1), other_model)[0]
    assert len(compare(meshes(1), other_requests)) == 2


def test_two_files_are_compared_without_a_mesh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("before.json", "same.json", "other.json")]
    for path, found in zip(paths, (meshes(1), meshes(1), meshes(2)), strict=True):
        path.write_text(json.dumps({"meshes": found}))
    assert main(["--read", str(paths[1]), "--compare", str(paths[0])]) == 0
    assert main(["--read", str(paths[2]), "--compare", str(paths[0])]) == 1
    assert "00 greedy" in capsys.readouterr().out
