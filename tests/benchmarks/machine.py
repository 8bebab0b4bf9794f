"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers


@dataclass(frozen=True)
class Machine:
    """Figures of two machines are not compared without this."""

    cpu: str
    cores: int
    memory_gib: float
    instruction_set: str
    flags: str
    """Those of the processor that kernels choose by."""
    kernel: str
    python: str
    torch: str
    transformers: str
    commit: str
    load_average: float
    """At the start, over one minute: what else the machine was doing."""


FLAG_PREFIXES = ("avx", "amx", "fma", "f16c")


def describe_machine() -> Machine:
    """Of this machine (Linux)."""
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return Machine(
        cpu=next((line.partition(":")[2].strip() for line in cpu_lines if line.startswith("model name")), "unknown"),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(int(memory.split()[1]) / 1024**2, 1),
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        flags=_flags(cpu_lines),
        kernel=platform.release(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=str(transformers.__version__),
        commit=_commit(),
        load_average=round(os.getloadavg()[0], 2),
    )


def _flags(cpu_lines: Sequence[str]) -> str:
    line = next((line for line in cpu_lines if line.startswith("flags")), "")
    return " ".join(flag for flag in line.partition(":")[2].split() if flag.startswith(FLAG_PREFIXES))


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
