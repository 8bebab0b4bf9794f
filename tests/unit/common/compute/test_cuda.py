"""Which device a setting names, on a machine that may have none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.compute.cuda import demand_exact_arithmetic, open_device, places_of_ranks
from common.errors import ConfigurationError

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_cpu_is_the_host() -> None:
    assert open_device("cpu").is_host


@needs_no_gpu
@pytest.mark.parametrize("setting", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused_with_what_torch_says(setting: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^DEVICE={setting} cannot be used: .*\(torch 2\..*DEVICE=cpu") as e:
        open_device(setting)
    assert "\n" not in str(e.value)


@needs_no_gpu
def test_auto_without_a_gpu_is_the_host() -> None:
    assert open_device("auto").is_host


@pytest.mark.parametrize(
    ("first", "num_ranks", "num_gpus", "places"),
    [
        ("cpu", 2, 0, ["cpu", "cpu"]),
        ("cuda:0", 2, 4, ["cuda:0", "cuda:1"]),
        ("cuda:2", 4, 4, ["cuda:2", "cuda:3", "cuda:0", "cuda:1"]),
        ("cuda:0", 3, 1, ["cuda:0"] * 3),
    ],
)
def test_ranks_go_round_the_gpus_from_the_first_ones(
    first: str, num_ranks: int, num_gpus: int, places: list[str]
) -> None:
    assert places_of_ranks(torch.device(first), num_ranks, num_gpus) == places


def test_short_sums_and_short_floats_are_switched_off() -> None:
    matmul = torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    demand_exact_arithmetic()
    assert not matmul.allow_tf32
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_nodes_import_before_they_are_forked_does_not_touch_cuda() -> None:
    code = (
        "import services.stage.process, services.expert.process, torch; "
        "print(torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork())"
    )
    root = Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
