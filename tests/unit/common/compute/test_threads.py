"""How many threads the native kernels start in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.nodes.kernels import kernels_for

THREADS = 3
WORK = f"""
import json, os
import torch
from common.compute.gated_ffn import GatedExpert, grouped_gated_ffn
from common.compute.linear import PackedLinear
from common.compute.native_library import load_native_kernels

torch.set_num_threads(1)
kernels = load_native_kernels(threads={THREADS})
before = len(os.listdir("/proc/self/task"))
counts = []
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.ones(640, 512).to(dtype)
    x = torch.ones(64, 512).to(dtype)
    PackedLinear(weight, kernels=kernels)(x)
    counts.append(len(os.listdir("/proc/self/task")) - before)
    for num_groups in (1, 8):
        experts = [GatedExpert(weight, weight, weight.T.contiguous(), kernels=kernels) for _ in range(num_groups)]
        grouped_gated_ffn(x, range(0, 65, 64 // num_groups), experts)
        counts.append(len(os.listdir("/proc/self/task")) - before)
print(json.dumps(counts))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_all_kernels_share_one_pool_of_threads() -> None:
    """A process with THREADS=3 computes on three, whatever it computes: two besides the one that asks."""
    kernels_for("native")
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, timeout=300, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])  # after what is logged
    assert counts == [THREADS - 1] * len(counts)


def test_auto_computes_the_same_on_every_core() -> None:
    kernels_for("native")
    code = """
import torch
from common.compute.linear import PackedLinear
from common.compute.native_library import load_native_kernels
from common.processes.cores import usable_cores

torch.manual_seed(0)
weight, x = torch.randn(640, 512), torch.randn(64, 512)
alone = PackedLinear(weight, kernels=load_native_kernels(threads=1))(x)
shared = PackedLinear(weight, kernels=load_native_kernels(threads=usable_cores()))
assert all(torch.equal(shared(x), alone) for _ in range(200))
"""
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)
