"""What this machine can do at best just now: bytes read from memory and products of bf16 matrices, a second.

    python -m tests.benchmarks.rates

Prints JSON. A limit is worth something only beside rates of the same hour: machines differ, and so do hours of a shared
one. Measured in a process of its own, whose threads are gone when what is to be compared runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial

READ_BYTES = 512 * 2**20
"""Many times what caches hold."""
ROWS = 512
LINEARS = ((1024, 1024), (1024, 2048))
"""(K, N) of the weights that are tried; the best one counts."""
ATTENTION = (16, 256, 32, 2048)
"""Heads, rows, head width, positions of the products QK and PV."""
TRIES = 12
ATTENTION_TRIES = 200
"""They take a millisecond: a thread that was away once would decide."""
TIMEOUT_S = 120


@dataclass(frozen=True)
class Rates:
    """With one thread and with as many as there are cores; each the best of several tries."""

    cores: int
    read_bytes_per_s: float
    """With one thread."""
    read_bytes_per_s_all: float
    """With all cores."""
    linear_flop_per_s: float
    linear_flop_per_s_all: float
    attention_flop_per_s_all: float
    """Products of the shapes of QK and PV, by the fastest of torch's in float32 and in bf16, and our kernel with its
    softmax."""


def measure_rates() -> Rates:
    """Raises RuntimeError with the measuring process's words if it fails."""
    command = [sys.executable, "-m", "tests.benchmarks.rates"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"rates could not be measured:\n{done.stderr}")
    return Rates(**json.loads(done.stdout.splitlines()[-1]))


def best_rates(measured: Sequence[Rates]) -> Rates:
    """Returns the best of each figure: what the machine can do, it did at some time."""
    return Rates(**{each.name: max(getattr(rates, each.name) for rates in measured) for each in fields(Rates)})


def _best_s(work: Callable[[], object], tries: int = TRIES) -> float:
    """The first try, which makes threads and packs weights, hardly ever is the best."""
    times_s = []
    for _ in range(tries):
        started_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def _read_bytes_per_s(threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    values = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _best_s(values.sum)


def _linear_flop_per_s(threads: int) -> float:
    import torch
    from torch.nn import functional

    from common.compute.linear import PackedLinear
    from common.compute.native_library import load_native_kernels

    torch.set_num_threads(threads)
    kernels = load_native_kernels(threads=threads)
    best = 0.0
    for k, n in LINEARS:
        x = torch.randn(ROWS, k).to(torch.bfloat16)
        weight = torch.randn(n, k).to(torch.bfloat16)
        ours = PackedLinear(weight, kernels=kernels)
        seconds = min(_best_s(partial(ours, x)), _best_s(partial(functional.linear, x, weight)))
        best = max(best, 2 * ROWS * k * n / seconds)
    return best


def _attention_flop_per_s(threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    heads, rows, head_width, positions = ATTENTION
    seconds = [_own_attention_s(threads)]
    for dtype in (torch.float32, torch.bfloat16):
        queries = torch.randn(heads, rows, head_width).to(dtype)
        keys = torch.randn(heads, positions, head_width).to(dtype)
        weights = torch.randn(heads, rows, positions).to(dtype)
        scores_s = _best_s(partial(torch.bmm, queries, keys.transpose(1, 2)), ATTENTION_TRIES)
        seconds.append(scores_s + _best_s(partial(torch.bmm, weights, keys), ATTENTION_TRIES))
    return 2 * 2 * heads * rows * head_width * positions / min(seconds)


def _own_attention_s(threads: int) -> float:
    """Of one KV head for four heads of queries, as in the models, each row at all positions."""
    import torch

    from common.compute.native_library import load_native_kernels
    from services.stage.model.paged_attention import (
        KV_BLOCK_TOKENS,
        AttendingRows,
        KvShape,
        allocate_kv_cache,
        paged_attention,
    )

    heads, rows, head_width, positions = ATTENTION
    blocks = positions // KV_BLOCK_TOKENS
    (cache,) = allocate_kv_cache(KvShape(1, blocks, heads // 4, head_width, torch.bfloat16))
    for tensor in (cache.keys, cache.values):
        tensor.normal_()
    queries = torch.randn(rows, heads, head_width).to(torch.bfloat16)
    attending = AttendingRows(
        block_tables=torch.arange(blocks, dtype=torch.int32)[None],
        row_sequence=torch.zeros(rows, dtype=torch.int32),
        positions=torch.full((rows,), positions - 1, dtype=torch.int32),
    )
    kernels = load_native_kernels(threads=threads)
    attend = partial(paged_attention, queries, cache, attending, scale=head_width**-0.5, kernels=kernels)
    return _best_s(attend, ATTENTION_TRIES)


def main() -> int:
    """Prints one line."""
    import torch

    cores = len(os.sched_getaffinity(0))
    with torch.inference_mode():
        rates = Rates(
            cores=cores,
            read_bytes_per_s=_read_bytes_per_s(1),
            read_bytes_per_s_all=_read_bytes_per_s(cores),
            linear_flop_per_s=_linear_flop_per_s(1),
            linear_flop_per_s_all=_linear_flop_per_s(cores),
            attention_flop_per_s_all=_attention_flop_per_s(cores),
        )
    print(json.dumps(asdict(rates)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
