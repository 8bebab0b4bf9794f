"""Stages of several processes: the same tokens and logprobs at every degree, also when ranks die or stop."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import NodeLostError
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.processes.process_table import children_of, is_alive
from tests.support.processes.waiting import wait_until
from tests.support.served.fault_runs import asks, pid_of, run_through
from tests.support.served.mesh_client import Answer
from tests.support.served.served_mesh import ServedMesh, served_mesh

MAX_GAP_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(Path(tmp_path_factory.mktemp("ranks")) / "tiny")


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[list[Answer]]:
    with served_mesh(model, {"PP": "1", "EXPERTS": "1"}) as served:
        yield served.client.ask_all(asks())


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[ServedMesh]:
    with served_mesh(model, {"PP": "2", "TP": "2", "EXPERTS": "2"}) as served:
        yield served


def ranks_of(mesh: ServedMesh, name: str) -> list[int]:
    """Process ids of a stage's other ranks."""
    return [rank for forks in children_of(pid_of(mesh, name)) for rank in children_of(forks)]


def degrees(mesh: ServedMesh, name: str) -> list[int]:
    """At which a stage has worked, in order."""
    lines = [json.loads(line) for line in mesh.local.logs(name).read_text().splitlines() if line[:1] == "{"]
    return [line["degree"] for line in lines if line["event"] == "ranks_work"]


def test_two_ranks_give_the_tokens_and_logprobs_of_one(mesh: ServedMesh, alone: list[Answer]) -> None:
    assert mesh.client.ask_all(asks()) == alone
    assert [degrees(mesh, name) for name in ("stage-0", "stage-1")] == [[2], [2]]


def wait_for_ranks(mesh: ServedMesh, name: str, num_ranks: int) -> None:
    wait_until(lambda: len(ranks_of(mesh, name)) == num_ranks - 1, 30, "the processes of the ranks")
    wait_until(lambda: degrees(mesh, name)[-1] == num_ranks, 60, "the full degree")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_costs_no_token_and_the_stage_comes_back_to_its_full_degree(
    mesh: ServedMesh, alone: list[Answer], number: signal.Signals
) -> None:
    wait_for_ranks(mesh, "stage-0", 2)
    before = len(degrees(mesh, "stage-0"))
    pid = pid_of(mesh, "stage-0")
    run_through(
        mesh,
        alone,
        f"a rank of stage-0 gets {number.name}",
        lambda: os.kill(ranks_of(mesh, "stage-0")[0], number),
        MAX_GAP_S,
    )
    wait_until(lambda: len(degrees(mesh, "stage-0")) > before, 30, "another incarnation")
    wait_for_ranks(mesh, "stage-0", 2)
    after = degrees(mesh, "stage-0")[before:]
    assert (after[0], after[-1]) == (1, 2), "first alone, then both"
    assert pid_of(mesh, "stage-0") == pid
    assert mesh.client.ask_all(asks()) == alone


def test_no_rank_outlives_its_stage(mesh: ServedMesh) -> None:
    wait_for_ranks(mesh, "stage-1", 2)
    (rank,) = ranks_of(mesh, "stage-1")
    os.kill(pid_of(mesh, "stage-1"), signal.SIGKILL)
    wait_until(lambda: not is_alive(rank), 10, "the end of the rank")


def test_gloo_and_the_board_give_the_same_bits(model: Path, alone: list[Answer]) -> None:
    with served_mesh(model, {"PP": "1", "TP": "2", "EXPERTS": "1", "TP_COLLECTIVES": "gloo"}) as served:
        assert served.client.ask_all(asks()[2:6]) == alone[2:6]


def test_a_degree_that_does_not_divide_the_heads_is_refused_with_the_numbers(model: Path) -> None:
    with (
        pytest.raises(NodeLostError, match=r"TP=3 does not divide this model's query heads, 4"),
        served_mesh(model, {"TP": "3"}),
    ):
        pass
