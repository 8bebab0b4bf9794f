"""Drafts as they ship: what repeats itself is guessed, the answer is the same, and the client is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.waiting import wait_until
from tests.support.served.fault_runs import metric
from tests.support.served.served_mesh import ServedMesh, served_mesh

REPEATING = {"prompt": [11, 12, 13, 14], "temperature": 0.0, "logit_bias": {str(70 + n): 100 for n in range(6)}}
"""It says six tokens, in an order that comes back now and then."""
AT_RANDOM = {"logit_bias": {"70": 100, "71": 100}}
"""It draws two tokens: each run of them stood somewhere before, and the next one is anybody's guess."""
NUM_TOKENS = 300
MAX_REPLIES = 40


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMesh]:
    model = write_tiny_checkpoint(Path(tmp_path_factory.mktemp("lookup")) / "tiny")
    with served_mesh(model, {"PP": "2", "EXPERTS": "2", "DRAFT_TOKENS": "8"}) as mesh:
        yield mesh


def ask(mesh: ServedMesh, **fields: Any) -> dict[str, Any]:
    common = {"model": mesh.client.model, "prompt": [9, 7, 80], "max_tokens": NUM_TOKENS, "logprobs": 2}
    body = {**common, "temperature": 1.0, "seed": 4, "ignore_eos": True, "return_token_ids": True, **fields}
    response = mesh.client.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def ask_until_drafted(mesh: ServedMesh, counted: str, **fields: Any) -> tuple[list[dict[str, Any]], int]:
    """Returns replies to the same request, and how many drafts usage has counted. How many are worth their rows depends
    on how long steps happen to take, but now and then some are tried."""
    replies: list[dict[str, Any]] = []
    total = 0
    while total < NUM_TOKENS / 10:
        assert len(replies) < MAX_REPLIES, f"{total} {counted} tokens in {MAX_REPLIES} replies"
        replies.append(ask(mesh, **fields))
        total += replies[-1]["usage"].get("completion_tokens_details", {}).get(f"{counted}_prediction_tokens", 0)
    return replies, total


def test_a_text_that_repeats_itself_is_drafted_to_the_same_bits_and_usage_says_so(mesh: ServedMesh) -> None:
    without = ask(mesh, drafts="off", **REPEATING)
    assert "completion_tokens_details" not in without["usage"]
    assert metric(mesh, "moemesh_drafts_planned_total") == 0
    assert len(set(without["choices"][0]["token_ids"][NUM_TOKENS // 2 :])) > 2, "not one token again and again"
    replies, num_accepted = ask_until_drafted(mesh, "accepted", **REPEATING)
    for reply in replies:
        assert reply["choices"] == without["choices"]
        assert reply["usage"]["completion_tokens"] == NUM_TOKENS
    wait_until(lambda: metric(mesh, "moemesh_drafts_accepted_total") == num_accepted, 10, "the metrics to say so")
    assert metric(mesh, "moemesh_steps_with_drafts_total") > 0


def test_a_text_of_which_most_guesses_are_wrong_has_the_same_bits_too(mesh: ServedMesh) -> None:
    without = ask(mesh, drafts="off", **AT_RANDOM)
    replies, _ = ask_until_drafted(mesh, "rejected", **AT_RANDOM)
    for reply in replies:
        assert reply["choices"] == without["choices"]
