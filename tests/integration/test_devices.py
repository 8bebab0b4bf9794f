"""Whole meshes whose stages and experts are on a GPU that is simulated (tests/support/nodes/simulated_gpu.py), and
what is said where none is. With real GPUs: tests/gpu/."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.errors import NodeLostError
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.integration.test_ranks import degrees, ranks_of
from tests.integration.test_stage_faults import READY_AGAIN_WITHIN_S, find_holder, holder_of
from tests.support.processes.simulated_gpu_node import MODULES
from tests.support.processes.waiting import wait_until
from tests.support.served.fault_runs import metric
from tests.support.served.mesh_client import Answer, Ask
from tests.support.served.served_mesh import served_mesh

ASKS = (
    Ask("A mesh serves one model.", 24, num_top_logprobs=3, ignore_eos=True),
    Ask("Small things joined together", 24, temperature=0.9, seed=7, num_top_logprobs=3, ignore_eos=True),
    Ask(tuple(range(3, 90)), 8, num_top_logprobs=3, ignore_eos=True),
)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("devices") / "tiny")


def same(one: Answer, other: Answer) -> bool:
    return (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)


@pytest.mark.slow
def test_a_mesh_on_gpus_answers_as_on_processors_and_its_mirrors_go_on_with_the_same_bits(model: Path) -> None:
    with served_mesh(model, {"PP": "2"}) as mesh:
        on_processors = mesh.client.ask_all(ASKS)
    with served_mesh(model, {"PP": "2", "SPARES": "1", "DEVICE": "cuda"}, modules=MODULES) as mesh:
        assert '"numeric_class": "cuda/torch/simulated' in mesh.local.logs("router-0").read_text()
        alone = [mesh.client.ask(ask) for ask in ASKS]
        assert all(same(*pair) for pair in zip(mesh.client.ask_all(ASKS), alone, strict=True))
        for theirs, ours in zip(on_processors, alone, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        wait_until(lambda: metric(mesh, "moemesh_mirrors_complete") == 1, READY_AGAIN_WITHIN_S, "the mirror")
        os.kill(dict(mesh.local.processes())[holder_of(mesh, 0)], signal.SIGKILL)
        assert all(same(*pair) for pair in zip(mesh.client.ask_all(ASKS), alone, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("collectives", ["auto", "gloo"])
def test_ranks_of_a_gpu_lose_one_and_grow_again_with_the_same_bits(model: Path, collectives: str) -> None:
    """With a mirror that takes over, until the slot is with a stage of one rank: one that has lost the other itself,
    now or before it was the mirror."""
    settings = {"PP": "2", "TP": "2", "SPARES": "1", "DEVICE": "cuda", "TP_COLLECTIVES": collectives}
    with served_mesh(model, settings, modules=MODULES) as mesh:
        assert '"numeric_class": "cuda/torch+parts2/simulated' in mesh.local.logs("router-0").read_text()
        alone = [mesh.client.ask(ask) for ask in ASKS]
        for num_lost in (1, 2, 3):
            wait_until(lambda: metric(mesh, "moemesh_mirrors_complete") == 1, READY_AGAIN_WITHIN_S, "the mirror")
            name = holder_of(mesh, 0)
            wait_until(lambda: len(ranks_of(mesh, name)) == 1, 30, "the process of the rank")  # noqa: B023
            before = {stage: len(degrees(mesh, stage)) for stage in mesh.local.children if stage.startswith("stage")}
            os.kill(ranks_of(mesh, name)[0], signal.SIGKILL)
            assert all(same(*pair) for pair in zip(mesh.client.ask_all(ASKS), alone, strict=True))
            name = holder_of(mesh, 0)
            is_whole = degrees(mesh, name)[-1] == 2 and len(degrees(mesh, name)) == before[name]
            if num_lost > 1 and not is_whole:
                break

        def has_grown() -> bool:
            """Since the last loss."""
            name = find_holder(mesh, 0)
            return name is not None and len(degrees(mesh, name)) > before[name] and degrees(mesh, name)[-2:] == [1, 2]

        wait_until(has_grown, 60, "a stage that has grown again")
        assert all(same(*pair) for pair in zip(mesh.client.ask_all(ASKS), alone, strict=True))


@pytest.mark.slow
def test_k_and_v_of_a_request_under_way_change_hands_when_its_stage_grows(model: Path) -> None:
    settings = {"PP": "1", "TP": "2", "DEVICE": "cuda"}
    ask = Ask("A mesh serves one model.", 160, temperature=0.8, seed=3, num_top_logprobs=1, ignore_eos=True)
    with served_mesh(model, settings, modules=MODULES) as mesh:
        expected = mesh.client.ask(ask)
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(mesh.client.ask, ask)
            os.kill(ranks_of(mesh, "stage-0")[0], signal.SIGKILL)
            wait_until(lambda: degrees(mesh, "stage-0")[-2:] == [1, 2], 60, "a stage that has grown again")
            assert not under_way.done(), "it is to go on at the full degree"
            assert same(under_way.result(), expected)


def test_a_gpu_among_processors_of_its_kind_is_refused(model: Path) -> None:
    """Whichever of the two comes second."""
    settings, places = {"PP": "1", "EXPERTS": "2"}, {"expert-1": {"DEVICE": "cuda"}}
    with (
        pytest.raises(
            NodeLostError, match=r"cannot start: .* DEVICE must name the same kind of device for all of them"
        ),
        served_mesh(model, settings, places=places, modules=MODULES),
    ):
        pass


@needs_no_gpu
def test_a_gpu_that_is_not_there_is_said_before_anything_is_served(model: Path) -> None:
    with (
        pytest.raises(NodeLostError, match=r"cannot start: .*DEVICE=cuda cannot be used: .*DEVICE=cpu computes"),
        served_mesh(model, {"DEVICE": "cuda"}),
    ):
        pass


@needs_no_gpu
def test_auto_serves_without_a_gpu(model: Path) -> None:
    with served_mesh(model, {"PP": "1", "EXPERTS": "1", "DEVICE": "auto"}) as mesh:
        assert mesh.client.ask(ASKS[2]).token_ids
        assert '"numeric_class": "cpu/' in mesh.local.logs("router-0").read_text()
