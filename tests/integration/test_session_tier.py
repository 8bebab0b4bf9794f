"""A conversation whose blocks others needed: it comes back from the session tier, with the bits of computing it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.integration.test_prefix_cache import BLOCK, ask, num_cached, prompt_of, said_by
from tests.integration.test_stage_faults import holder_of, wait_for_mirrors
from tests.support.processes.waiting import wait_until
from tests.support.served.fault_runs import metric, pid_of
from tests.support.served.metrics_text import read_metrics
from tests.support.served.served_mesh import ServedMesh, served_mesh

POOL_TOKENS = 1024
LENGTH = 500


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMesh]:
    model = write_tiny_checkpoint(Path(tmp_path_factory.mktemp("sessions")) / "tiny")
    shape = {"PP": "2", "SPARES": "2", "EXPERTS": "2", "COPIES": "2", "KV_CACHE_TOKENS": str(POOL_TOKENS)}
    with served_mesh(model, shape) as served:
        yield served


def evict(mesh: ServedMesh, name: str) -> None:
    """Another prompt takes the whole pool."""
    ask(mesh, prompt_of(f"instead of {name}", POOL_TOKENS - 8), max_tokens=2)


def num_restored(mesh: ServedMesh) -> float:
    found = read_metrics(mesh.client.get("/metrics").text).by_label("moemesh_prefix_blocks_found_total", "tier")
    return found["session"]


def evicted(mesh: ServedMesh, name: str, **fields: Any) -> tuple[list[int], dict[str, Any]]:
    """A prompt that had to make room, and what is answered to it when nothing of it is found."""
    prompt = prompt_of(name, LENGTH)
    cold = ask(mesh, prompt, cache="off", **fields)
    ask(mesh, prompt, **fields)
    evict(mesh, name)
    return prompt, cold


def test_a_prompt_that_had_to_make_room_comes_back_with_its_bits_and_counts_as_cached(mesh: ServedMesh) -> None:
    prompt, cold = evicted(mesh, "comes back")
    before = num_restored(mesh)
    warm = ask(mesh, prompt)
    assert said_by(warm) == said_by(cold)
    assert num_cached(warm) == LENGTH // BLOCK * BLOCK
    wait_until(lambda: num_restored(mesh) == before + LENGTH // BLOCK, 10, "the metrics to say so")
    assert metric(mesh, "moemesh_session_blocks_saved_total") >= LENGTH // BLOCK
    assert 0 < metric(mesh, "moemesh_session_slots_used") <= metric(mesh, "moemesh_session_slots")


def test_choices_get_what_comes_back_once(mesh: ServedMesh) -> None:
    prompt, cold = evicted(mesh, "choices", n=2)
    before = num_restored(mesh)
    warm = ask(mesh, prompt, n=2)
    assert [said_by(warm, choice) for choice in range(2)] == [said_by(cold, choice) for choice in range(2)]
    wait_until(lambda: num_restored(mesh) == before + LENGTH // BLOCK, 10, "the metrics to say so")


@pytest.mark.parametrize("slot", [0, 1])
def test_after_a_takeover_the_tier_is_empty_and_the_answer_the_same(mesh: ServedMesh, slot: int) -> None:
    prompt, cold = evicted(mesh, f"before {slot}")
    wait_for_mirrors(mesh)
    os.kill(pid_of(mesh, holder_of(mesh, slot)), signal.SIGKILL)
    reply = ask(mesh, prompt)
    assert said_by(reply) == said_by(cold)
    assert num_cached(reply) == 0


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_mirror_that_takes_over_while_or_after_it_comes_back_has_it_too(
    mesh: ServedMesh, slot: int, has_begun: bool
) -> None:
    """Not `has_begun`: it is killed as soon as the request is sent; else once it decodes."""
    fields: dict[str, Any] = {"max_tokens": 200}
    prompt, cold = evicted(mesh, f"killed {slot} {has_begun}", **fields)
    wait_for_mirrors(mesh)
    before = num_restored(mesh)
    name, replies = holder_of(mesh, slot), list[dict[str, Any]]()
    under_way = threading.Thread(target=lambda: replies.append(ask(mesh, prompt, **fields)))
    under_way.start()
    if has_begun:
        wait_until(lambda: num_restored(mesh) > before, 10, "it to come back")
    os.kill(pid_of(mesh, name), signal.SIGKILL)
    under_way.join()
    replies.append(ask(mesh, prompt, **fields))
    assert [said_by(reply) for reply in replies] == [said_by(cold)] * 2
    if has_begun:
        assert [num_cached(reply) for reply in replies] == [LENGTH // BLOCK * BLOCK] * 2, "the mirror has it"


def test_a_stage_with_ranks_gets_it_back_too(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    with served_mesh(model, {"PP": "2", "TP": "2", "EXPERTS": "2", "KV_CACHE_TOKENS": str(POOL_TOKENS)}) as mesh:
        prompt, cold = evicted(mesh, "ranks")
        warm = ask(mesh, prompt)
        assert said_by(warm) == said_by(cold)
        assert num_cached(warm) == LENGTH // BLOCK * BLOCK
        wait_until(lambda: num_restored(mesh) == LENGTH // BLOCK, 10, "the metrics to say so")
