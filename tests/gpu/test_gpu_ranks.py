"""Ranks of a stage on GPUs: on one that they share, by the board, and where there are two, by NCCL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.compute.cuda import CudaDevice
from services.stage.ranks.torch_collectives import open_store
from tests.gpu.test_gpu_mesh import AT_ONCE, MAX_TOKENS, bits
from tests.integration.test_ranks import degrees, ranks_of
from tests.integration.test_stage_faults import READY_AGAIN_WITHIN_S, holder_of
from tests.parity.verdict import ParityCount, assert_parity
from tests.support.checkpoints.prompts import random_prompts
from tests.support.checkpoints.shelf import Shelf
from tests.support.checkpoints.tiny_checkpoints import QWEN3, QWEN3_DENSE_LAYERS, Recipe
from tests.support.processes.waiting import wait_until
from tests.support.served.fault_runs import metric
from tests.support.served.mesh_client import Ask
from tests.support.served.served_mesh import served_mesh
from tests.unit.stage.ranks.test_device_ranks import computed, device_ranks, same

pytestmark = pytest.mark.gpu
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("recipe", [QWEN3, QWEN3_DENSE_LAYERS], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_that_has_lost_ranks_gives_the_bits_of_the_full_one(
    gpu: CudaDevice, shelf: Shelf, recipe: Recipe, dtype: torch.dtype
) -> None:
    """Ranks are threads here, with a device object each on the same GPU."""
    with device_ranks(shelf.checkpoint(recipe), 4, new_device=lambda: CudaDevice(gpu.place, 1)) as ranks:
        full = computed(ranks, dtype)
        for lost, degree in ((3, 2), (1, 2), (2, 1)):
            ranks.lose(lost)
            ranks.group.reform()
            assert same(computed(ranks, dtype), full), degree


@pytest.mark.parametrize("collectives", ["auto", "gloo"])
def test_ranks_give_the_references_tokens_and_go_on_when_one_is_killed(shelf: Shelf, collectives: str) -> None:
    reference = shelf.reference(QWEN3_DENSE_LAYERS)
    prompts = random_prompts(reference.vocabulary, seed=7)
    shape = {"PP": "2", "TP": "2", "SPARES": "1", "DEVICE": "cuda", "DTYPE": "float32"}
    with served_mesh(shelf.checkpoint(QWEN3_DENSE_LAYERS), {**shape, "TP_COLLECTIVES": collectives}) as mesh:
        asks = [Ask(prompt, MAX_TOKENS, num_top_logprobs=2) for prompt in prompts]
        alone = [mesh.client.ask(ask) for ask in asks]
        for prompt, answer in zip(prompts, alone, strict=True):
            assert_parity(answer, reference.answer(prompt, MAX_TOKENS), reference, ParityCount())
        expected = [bits(answer) for answer in alone]
        assert [bits(answer) for answer in mesh.client.ask_all(asks, concurrency=AT_ONCE)] == expected
        wait_until(lambda: metric(mesh, "moemesh_mirrors_complete") == 1, READY_AGAIN_WITHIN_S, "the mirror")
        name = holder_of(mesh, 0)
        os.kill(ranks_of(mesh, name)[0], signal.SIGKILL)
        assert [bits(answer) for answer in mesh.client.ask_all(asks, concurrency=AT_ONCE)] == expected
        wait_until(lambda: degrees(mesh, name)[-1] == 2, READY_AGAIN_WITHIN_S, "the full degree")
        assert [bits(answer) for answer in mesh.client.ask_all(asks, concurrency=AT_ONCE)] == expected


ONE_OF_TWO = """
import sys, time, torch
from services.stage.ranks.torch_collectives import TorchCollectives, open_store
torch.cuda.set_device(1)
collectives = TorchCollectives(open_store(int(sys.argv[1])), 1, 2, torch.device("cuda", 1))
collectives.all_gather(torch.ones(4, 4, device="cuda:1"))
torch.cuda.synchronize()
print("met", flush=True)
time.sleep(600)
"""


@needs_two_gpus
def test_a_collective_whose_peer_is_killed_is_given_up_and_the_gpu_works_again(gpu: CudaDevice) -> None:
    from services.stage.ranks.torch_collectives import TorchCollectives

    store = open_store()
    peer = subprocess.Popen(
        [sys.executable, "-c", ONE_OF_TWO, str(store.port)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    try:
        collectives = TorchCollectives(store, 0, 2, gpu.place)
        part = torch.ones(4, 4, device=gpu.place)
        collectives.all_gather(part)
        assert peer.stdout is not None
        assert peer.stdout.readline() == "met\n"
        peer.kill()
        whole = collectives.all_gather(part)
        download = gpu.begin_download(whole)
        time.sleep(0.5)
        assert not download.is_ready(), "nobody answers"
        began_s = time.monotonic()
        collectives.close()
        download.give_up()
        assert float(gpu.to_host(part.sum())[0]) == 16.0
        assert time.monotonic() - began_s < 5
    finally:
        peer.kill()
        peer.wait()
