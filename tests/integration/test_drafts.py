"""Guessed tokens, right and wrong ones: nothing is different but the number of steps, also where a stage is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.integration.test_stage_faults import MAX_GAP_S, holder_of, wait_for_mirrors
from tests.support.processes.waiting import wait_until
from tests.support.served.drafting_router import modules_for
from tests.support.served.fault_runs import asks, metric, pid_of, run_through
from tests.support.served.mesh_client import Answer, mesh_client
from tests.support.served.metrics_text import read_metrics
from tests.support.served.resumable import ResumableStream, RunningResumableStreams
from tests.support.served.served_mesh import ServedMesh, served_mesh

SETTINGS = {"PP": "2", "SPARES": "2", "EXPERTS": "2", "COPIES": "2"}
PROMPT = [9, 7, 80, 81, 82]
NUM_TOKENS = 400
"""Of an answer during which something is killed: a step gives several."""
LEAST_DRAFTED = 10
"""Steps with drafts in a run in which something is killed."""
BODIES: dict[str, dict[str, Any]] = {
    "choices": {"n": 3, "temperature": 1.0, "seed": 5},
    "biases": {"logit_bias": {"70": 3.0, "71": -5.0}, "temperature": 1.0, "seed": 5, "min_p": 0.01},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "filters": {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 8},
}


def body_of(mesh: ServedMesh, **fields: Any) -> dict[str, Any]:
    return {
        "model": mesh.client.model,
        "prompt": PROMPT,
        "max_tokens": 60,
        "temperature": 0.0,
        "logprobs": 3,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }


def ask(mesh: ServedMesh, **fields: Any) -> list[dict[str, Any]]:
    """All that is said of each choice."""
    response = mesh.client.post("/v1/completions", body_of(mesh, **fields))
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def late_stop(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """Asks for an end at a token that does not come before the 20th; until the 10th it must not be drawn."""
    token_ids = choices[0]["token_ids"]
    new = next(token for place, token in enumerate(token_ids) if place >= 20 and token not in token_ids[:place])
    return {"stop_token_ids": [new], "min_tokens": 10}


@dataclass(frozen=True)
class Undisturbed:
    """What a mesh says that drafts nothing."""

    answers: list[Answer]
    bodies: dict[str, list[dict[str, Any]]]
    stopping: dict[str, Any]
    stopped: list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(Path(tmp_path_factory.mktemp("drafts")) / "tiny")


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> Undisturbed:
    with served_mesh(model, {**SETTINGS, "SPARES": "0"}) as mesh:
        bodies = {name: ask(mesh, **fields) for name, fields in BODIES.items()}
        stopping = BODIES["filters"] | late_stop(bodies["filters"])
        return Undisturbed(mesh.client.ask_all(asks(NUM_TOKENS)), bodies, stopping, ask(mesh, **stopping))


@pytest.fixture(scope="module")
def drafting(model: Path, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMesh]:
    answers: list[tuple[Sequence[int], Sequence[int]]] = [
        (answer.prompt_token_ids, answer.token_ids) for answer in undisturbed.answers
    ]
    for choices in (*undisturbed.bodies.values(), undisturbed.stopped):
        answers += [(PROMPT, choice["token_ids"]) for choice in choices]
    modules = modules_for(answers, tmp_path_factory.mktemp("answers"))
    with served_mesh(model, SETTINGS, modules=modules) as mesh:
        yield mesh


def num_drafted_steps(mesh: ServedMesh) -> float:
    with mesh_client(mesh.local.url) as client:  # a new router is at another port
        return read_metrics(client.get("/metrics").text).value("moemesh_steps_with_drafts_total")


def num_steps_and_tokens(mesh: ServedMesh) -> tuple[float, float]:
    return metric(mesh, "moemesh_steps_planned_total"), metric(mesh, "moemesh_tokens_generated_total")


def test_answers_have_the_bits_that_they_have_without_drafts_in_fewer_steps(
    drafting: ServedMesh, undisturbed: Undisturbed
) -> None:
    num_alone = 3
    assert [drafting.client.ask(each) for each in asks(NUM_TOKENS)[:num_alone]] == undisturbed.answers[:num_alone]
    num_expected = sum(len(answer.token_ids) for answer in undisturbed.answers[:num_alone])
    wait_until(lambda: num_steps_and_tokens(drafting)[1] >= num_expected, 10, "the metrics to say so")
    num_steps, num_tokens = num_steps_and_tokens(drafting)
    assert num_steps < 0.6 * num_tokens
    assert metric(drafting, "moemesh_tokens_planned_total") > num_tokens + 100, "some drafts were wrong"
    assert drafting.client.ask_all(asks(NUM_TOKENS)) == undisturbed.answers


@pytest.mark.parametrize("name", BODIES)
def test_choices_penalties_biases_and_filters_are_those_without_drafts(
    drafting: ServedMesh, undisturbed: Undisturbed, name: str
) -> None:
    assert ask(drafting, **BODIES[name]) == undisturbed.bodies[name]


def test_an_answer_ends_where_it_ends_without_drafts(drafting: ServedMesh, undisturbed: Undisturbed) -> None:
    assert undisturbed.stopped[0]["finish_reason"] == "stop"
    assert ask(drafting, **undisturbed.stopping) == undisturbed.stopped
    whole = undisturbed.bodies["filters"][0]
    stop = whole["text"][len(whole["text"]) // 2 :][:3]
    stopped = ask(drafting, **BODIES["filters"], stop=[stop])[0]
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]


@pytest.mark.parametrize("slot", [0, 1])
def test_a_stage_that_is_killed_while_drafts_are_looked_at_changes_nothing(
    drafting: ServedMesh, undisturbed: Undisturbed, slot: int
) -> None:
    wait_for_mirrors(drafting)
    pid = pid_of(drafting, holder_of(drafting, slot))
    num_before = num_drafted_steps(drafting)
    what = f"slot {slot} killed"
    run_through(drafting, undisturbed.answers, what, lambda: os.kill(pid, signal.SIGKILL), MAX_GAP_S, NUM_TOKENS)
    wait_until(lambda: num_drafted_steps(drafting) > num_before + LEAST_DRAFTED, 10, "steps with drafts")


def test_a_router_that_is_killed_goes_on_with_what_was_right(drafting: ServedMesh, undisturbed: Undisturbed) -> None:
    """Stages have positions of wrong drafts, and a new router counts none of these."""
    for number in range(2):
        streams = [
            ResumableStream(f"{number}-{place}", "/v1/completions", each.body(drafting.client.model) | {"stream": True})
            for place, each in enumerate(asks(NUM_TOKENS))
        ]
        with RunningResumableStreams(lambda: drafting.local.url, streams) as running:
            wait_until(lambda: all(stream.has_tokens for stream in running.streams), 30, "first tokens", 0.005)
            os.kill(dict(drafting.local.processes())["router-0"], signal.SIGKILL)
        assert any(stream.num_attachments > 1 for stream in streams), "killed in mid-stream"
        for stream, expected in zip(streams, undisturbed.answers, strict=True):
            assert stream.errors == []
            said = [token for choice in stream.choices[0] for token in choice.get("token_ids") or ()]
            assert tuple(said) == expected.token_ids
        drafting.local.wait_ready(60)
        wait_until(lambda: num_drafted_steps(drafting) > LEAST_DRAFTED, 10, "steps of the new router with drafts")
