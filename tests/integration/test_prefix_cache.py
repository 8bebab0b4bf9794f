"""A prompt that begins like an earlier one: found, and answered with the bits that computing it would give."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.integration.test_stage_faults import holder_of, wait_for_mirrors
from tests.support.processes.waiting import wait_until
from tests.support.served.fault_runs import metric, pid_of
from tests.support.served.served_mesh import ServedMesh, served_mesh

BLOCK = 32
Said = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMesh]:
    model = write_tiny_checkpoint(Path(tmp_path_factory.mktemp("prefixes")) / "tiny")
    with served_mesh(model, {"PP": "2", "SPARES": "2", "EXPERTS": "2", "COPIES": "2"}) as served:
        yield served


def prompt_of(name: str, length: int) -> list[int]:
    drawn = random.Random(name)
    return [drawn.randrange(3, 200) for _ in range(length)]


def ask(mesh: ServedMesh, prompt: list[int], headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    body = {
        "model": mesh.client.model,
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": 0.9,
        "seed": 7,
        "logprobs": 3,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }
    response = mesh.client._http.post(f"{mesh.client.url}/v1/completions", json=body, headers=headers or {})
    assert response.status_code == 200, response.text
    said: dict[str, Any] = response.json()
    return said


def said_by(reply: dict[str, Any], choice: int = 0) -> Said:
    """Everything of a choice that was computed, to the last bit."""
    found = reply["choices"][choice]
    return found["token_ids"], [found["logprobs"]["token_logprobs"], found["logprobs"]["top_logprobs"]]


def num_cached(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_warm_prompt_has_the_bits_of_a_cold_one_and_usage_says_what_was_found(mesh: ServedMesh) -> None:
    prompt = prompt_of("warm", 700)
    cold = ask(mesh, prompt, cache="off")
    first, warm = ask(mesh, prompt), ask(mesh, prompt)
    assert said_by(cold) == said_by(first) == said_by(warm)
    assert [num_cached(reply) for reply in (cold, first, warm)] == [0, 0, 700 // BLOCK * BLOCK]
    longer = [*prompt, *cold["choices"][0]["token_ids"], 5, 6, 7]
    assert said_by(ask(mesh, longer)) == said_by(ask(mesh, longer, cache="off"))
    assert num_cached(ask(mesh, prompt[:640])) == 640 - BLOCK, "its last token is computed"


def test_choices_and_requests_that_come_together_compute_a_prompt_once(mesh: ServedMesh) -> None:
    prompt = prompt_of("choices", 600)
    time.sleep(0.3)  # the metrics are as old as the last status
    found = metric(mesh, "moemesh_prefix_blocks_found_total")
    reply, cold = ask(mesh, prompt, n=3), ask(mesh, prompt, n=3, cache="off")
    assert [said_by(reply, choice) for choice in range(3)] == [said_by(cold, choice) for choice in range(3)]
    wanted = found + 2 * (600 // BLOCK)
    wait_until(lambda: metric(mesh, "moemesh_prefix_blocks_found_total") >= wanted, 10, "the metrics to say so")
    assert metric(mesh, "moemesh_prefix_blocks_found_total") == wanted


def test_a_salt_parts_tenants_and_a_request_may_go_past_the_cache(mesh: ServedMesh) -> None:
    prompt = prompt_of("salts", 300)
    salted = {"Moemesh-Cache-Salt": "a"}
    assert num_cached(ask(mesh, prompt, salted)) == 0
    assert num_cached(ask(mesh, prompt)) == 0
    assert num_cached(ask(mesh, prompt, {"Moemesh-Cache-Salt": "b"})) == 0
    assert num_cached(ask(mesh, prompt, salted)) == num_cached(ask(mesh, prompt, cache_salt="a")) == 288
    assert num_cached(ask(mesh, prompt, cache="off")) == 0
    ask(mesh, prompt_of("unseen", 100), cache="off")
    assert num_cached(ask(mesh, prompt_of("unseen", 100))) == 0


@pytest.mark.parametrize("slot", [0, 1])
def test_a_mirror_that_takes_over_beneath_a_hit_changes_no_bit(mesh: ServedMesh, slot: int) -> None:
    prompt = prompt_of(f"killed {slot}", 900)
    fields: dict[str, Any] = {"max_tokens": 200}
    cold = ask(mesh, prompt, cache="off", **fields)
    ask(mesh, prompt, **fields)
    wait_for_mirrors(mesh)
    name, replies = holder_of(mesh, slot), list[dict[str, Any]]()
    under_way = threading.Thread(target=lambda: replies.append(ask(mesh, prompt, **fields)))
    under_way.start()
    wait_until(lambda: metric(mesh, "moemesh_requests_running") > 0, 10, "the request to run")
    os.kill(pid_of(mesh, name), signal.SIGKILL)
    under_way.join()
    replies.append(ask(mesh, prompt, **fields))
    assert [said_by(reply) for reply in replies] == [said_by(cold)] * 2
    assert [num_cached(reply) for reply in replies] == [896, 896], "the mirror has what was cached"


def test_a_mirror_that_joined_late_has_what_nobody_holds(mesh: ServedMesh) -> None:
    """Both mirrors of before have become holders: those of now were filled when the prompt was no request's."""
    prompt = prompt_of("killed 0", 900)
    wait_for_mirrors(mesh)
    cold = ask(mesh, prompt, cache="off", max_tokens=60)
    for slot in (0, 1):
        os.kill(pid_of(mesh, holder_of(mesh, slot)), signal.SIGKILL)
        wait_for_mirrors(mesh)
    ask(mesh, prompt_of("any", 4))  # an answer of those that compute now says their class: before it nothing is found
    warm = ask(mesh, prompt, max_tokens=60)
    assert said_by(warm) == said_by(cold)
    assert num_cached(warm) == 896
