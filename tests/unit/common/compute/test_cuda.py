"""Which device a setting names, on a machine that may have none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.compute.cuda import demand_exact_arithmetic, open_device
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


def test_auto_with_ranks_does_not_touch_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks share the host's memory, and a process that has touched CUDA cannot be forked."""

    def touched() -> bool:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_available", touched)
    assert open_device("auto", num_ranks=2).is_host


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
