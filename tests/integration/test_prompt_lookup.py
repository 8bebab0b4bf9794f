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


def test_a_text_that_repeats_itself_is_drafted_to_the_same_bits_and_usage_says_so(mesh: ServedMesh) -> None:
    without = ask(mesh, drafts="off", **REPEATING)
    assert "completion_tokens_details" not in without["usage"]
    assert metric(mesh, "moemesh_drafts_planned_total") == 0
    assert len(set(without["choices"][0]["token_ids"][NUM_TOKENS // 2 :])) > 2, "not one token again and again"
    drafted = ask(mesh, **REPEATING)
    assert drafted["choices"] == without["choices"]
    details = drafted["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > NUM_TOKENS / 4
    assert drafted["usage"]["completion_tokens"] == NUM_TOKENS
    wait_until(lambda: metric(mesh, "moemesh_drafts_accepted_total") > NUM_TOKENS / 4, 10, "the metrics to say so")
    assert metric(mesh, "moemesh_steps_with_drafts_total") > 0


def test_a_text_of_which_most_guesses_are_wrong_has_the_same_bits_too(mesh: ServedMesh) -> None:
    drafted = ask(mesh, **AT_RANDOM)
    assert drafted["choices"] == ask(mesh, drafts="off", **AT_RANDOM)["choices"]
    details = drafted["usage"]["completion_tokens_details"]
    assert details["rejected_prediction_tokens"] > max(20, details["accepted_prediction_tokens"])
