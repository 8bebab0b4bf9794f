"""How much memory a mesh takes, and what its model needs of it.

    make bench-memory BENCH_ARGS="--model ../bench --streams 16"

Counts proportional set sizes (`Pss` of /proc/PID/smaps_rollup: a page that several processes share counts once) of all
processes of a mesh, after a load. The bound: 1.2 times the weights of stages and of all copies of experts, K, V and the
activation log as stages say that they have them, a ring for each expert node that a stage says it has opened one to,
and 150 MB for each process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint.model_config import read_model_config
from common.processes.supervisor import LocalMesh
from common.wire.call_ring import ring_shape
from compose.demo_checkpoint import DEMO_CHECKPOINT
from tests.benchmarks.serve_benchmark import READY_WITHIN_S, MeshUnderTest, PromptSource
from tests.support.processes.process_table import children_of

SMALLEST_VOCABULARY = 400
WEIGHTS_FACTOR = 1.2
PROCESS_BYTES = 150_000_000
MIB = 1 << 20


@dataclass(frozen=True)
class ProcessMemory:
    """One process at one moment, in bytes."""

    name: str
    pid: int
    pss: int
    anonymous: int
    """Of `pss`, what is its own or a fork's: heaps, packed weights, K and V."""
    mapped: int
    """Of `pss`, files: code and checkpoints."""
    shared: int
    """Of `pss`, shared memory: rings, and K and V of ranks."""


def read_memory(name: str, pid: int, proc: Path = Path("/proc")) -> ProcessMemory:
    """Raises OSError if there is no such process."""
    rollup = sizes(proc.joinpath(str(pid), "smaps_rollup").read_text())
    return ProcessMemory(
        name,
        pid,
        *(rollup.get(entry, 0) for entry in ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem")),
    )


def sizes(smaps: str) -> dict[str, int]:
    """Returns bytes by entry of the text of a `smaps_rollup`."""
    return {name: 1024 * int(kib) for name, kib in re.findall(r"^(\w+): +(\d+) kB$", smaps, re.MULTILINE)}


@dataclass(frozen=True)
class ModelBytes:
    """Weights of a checkpoint as they lie in its files."""

    stages: int
    experts: int


def weights_of(checkpoint: Path) -> ModelBytes:
    """Reads the headers of the checkpoint's safetensors files (an 8-byte length, then JSON)."""
    stages = experts = 0
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(*struct.unpack("<Q", file.read(8))))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            start, stop = tensor["data_offsets"]
            if ".experts." in name:
                experts += stop - start
            else:
                stages += stop - start
    return ModelBytes(stages, experts)


def cache_bytes(log: str) -> int:
    """Returns what a stage's log says of its K, V and activation log: its last slot's."""
    taken = re.findall(r'"kv_bytes": (\d+)', log)
    return int(taken[-1]) if taken else 0


def num_rings(log: str) -> int:
    """Returns to how many nodes a stage's log says that it has a ring, each once: a former one should be gone."""
    opened = (json.loads(line) for line in log.splitlines() if '"ring_open"' in line)
    return len({event["node"] for event in opened})


def ring_bytes(checkpoint: Path, settings: Mapping[str, str]) -> int:
    """Returns the size of one ring of a mesh."""
    config = read_model_config(checkpoint)
    named = settings.get("DTYPE", "auto")
    value_bytes = 4 if (config.dtype if named == "auto" else named) == "float32" else 2  # float16 is held as bfloat16
    pairs_per_token = config.num_experts_per_token * int(settings.get("EXPERT_SLICES", "1"))
    return ring_shape(config.hidden_size, value_bytes, pairs_per_token).num_bytes


def bound_bytes(model: ModelBytes, copies: int, caches: int, rings: int, num_processes: int) -> int:
    """Returns what the mesh may take."""
    weights = WEIGHTS_FACTOR * (model.stages + copies * model.experts)
    return int(weights) + caches + rings + num_processes * PROCESS_BYTES


def table(processes: Iterable[ProcessMemory]) -> str:
    """Returns Markdown, in MiB."""
    lines = ["| process | PSS | its own | files | shared |", "| --- | --- | --- | --- | --- |"]
    for each in processes:
        values = (each.pss, each.anonymous, each.mapped, each.shared)
        lines.append(" | ".join([f"| {each.name}", *(f"{value / MIB:.0f}" for value in values)]) + " |")
    return "\n".join(lines)


def descendants(pid: int) -> list[int]:
    """Returns its children and theirs."""
    children = children_of(pid)
    return [*children, *(each for child in children for each in descendants(child))]


def measure(model: Path, settings: dict[str, str], streams: int, tokens: int) -> tuple[list[ProcessMemory], list[str]]:
    """Returns the processes of a mesh after a load, the supervisor left out, and the logs of its stages."""
    state_dir = Path(tempfile.mkdtemp(prefix="memory-"))
    try:
        with LocalMesh({"MODEL": str(model), "PORT": "0"} | settings, state_dir) as local:
            local.wait_ready(READY_WITHIN_S)
            MeshUnderTest(local).run_round(PromptSource(SMALLEST_VOCABULARY).take(streams, 128), tokens)
            names = {pid: name for name, pid in local.processes()}
            found = [read_memory(names.get(pid) or name_of(pid), pid) for pid in descendants(os.getpid())]
            stages = [name for name, kind in local.kinds().items() if kind == "stage"]
            return found, [local.logs(name).read_text() for name in stages]
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)


def name_of(pid: int) -> str:
    """Returns what `ps -o comm` shows."""
    return (Path("/proc") / str(pid) / "comm").read_text().strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module. Exit status 1 where the mesh takes more than the bound."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_CHECKPOINT, help="folder of a checkpoint")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--copies", type=int, default=2, help="copies of each expert that the mesh holds")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the mesh")
    parsed = parser.parse_args(arguments)
    settings = dict(setting.split("=", 1) for setting in parsed.set) | {"COPIES": str(parsed.copies)}
    processes, logs = measure(parsed.model.resolve(), settings, parsed.streams, parsed.tokens)
    model, taken = weights_of(parsed.model), sum(each.pss for each in processes)
    caches = sum(map(cache_bytes, logs))
    rings = sum(map(num_rings, logs)) * ring_bytes(parsed.model, settings)
    bound = bound_bytes(model, parsed.copies, caches, rings, len(processes))
    print(table(processes))
    print(
        f"all: {taken / MIB:.0f} MiB; bound {bound / MIB:.0f} MiB: stages {model.stages / MIB:.0f}, experts "
        f"{model.experts / MIB:.0f} x {parsed.copies}, caches {caches / MIB:.0f}, rings {rings / MIB:.0f}, "
        f"{len(processes)} processes"
    )
    return int(taken > bound)


if __name__ == "__main__":
    raise SystemExit(main())
