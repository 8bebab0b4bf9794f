"""Who is measured: a name for the tables, what it reads as weights, how it is set up, and how it is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tests.benchmarks.checkout_mesh import THIS_CHECKOUT
from tests.benchmarks.peers.engines import Engine, HttpEngine, LlamaEngine, mesh_engine, vllm_engine
from tests.benchmarks.peers.openvino_engine import openvino_engine
from tests.benchmarks.transformers_peer import TransformersPeer

SET_UP = Path(__file__).with_name("set_up.sh")
PEERS = ("llama.cpp", "llama.cpp q4_0", "vllm", "openvino", "transformers")
E = TypeVar("E", bound=Engine, covariant=True)


@dataclass(frozen=True)
class Contender(Generic[E]):
    """One row of the tables."""

    name: str
    is_peer: bool
    weights: str
    """`bf16`, or the name of a quantization: such a row is there for information, and nothing is held against it."""
    used: str
    """With which version and settings."""
    start: Callable[[], AbstractContextManager[E]]


class AbsentError(Exception):
    """A peer that cannot be measured here; the message says why."""


def mesh_contender(checkpoint: Path, settings: dict[str, str]) -> Contender[HttpEngine]:
    """The mesh with its defaults, but for `settings`."""
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    name = f"mesh {words}".strip()
    return Contender(name, False, "bf16", words or "the defaults", lambda: mesh_engine(checkpoint, settings))


def peer_contender(name: str, checkpoint: Path, peers_dir: Path) -> Contender[Engine]:
    """Sets the peer up, where that is still to be done. Raises AbsentError."""
    cores = sorted(os.sched_getaffinity(0))
    match name:
        case "transformers":
            used = f"generate() without HTTP, one static batch, {len(cores)} threads"
            return Contender(
                name,
                True,
                "bf16",
                used,
                lambda: TransformersPeer(checkpoint, "bfloat16", len(cores), is_sampling=True),
            )
        case "vllm":
            home, version = set_up(name, peers_dir)
            used = f"{version}, {len(cores)} threads bound to cores, no prefix cache"
            return Contender(name, True, "bf16", used, lambda: vllm_engine(home, checkpoint, cores))
        case "openvino":
            home, version = set_up(name, peers_dir)
            exported = export_for_openvino(home, checkpoint)
            used = f"{version}, continuous batching without HTTP"
            return Contender(name, True, "bf16", used, lambda: openvino_engine(home, exported, len(cores)))
        case "llama.cpp" | "llama.cpp q4_0":
            home, version = set_up("llama.cpp", peers_dir)
            kind = "bf16" if name == "llama.cpp" else "q4_0"
            weights = convert_for_llama(home, checkpoint, kind)
            used = f"{version}, llama-server -t {len(cores)} -np STREAMS --cont-batching, float16 cache"
            return Contender(name, True, kind, used, lambda: LlamaEngine(home, weights, len(cores)))
    raise AbsentError(f"there is no peer named {name}")


def set_up(peer: str, peers_dir: Path) -> tuple[Path, str]:
    """Returns the peer's folder and what its stamp says. Raises AbsentError with the script's last line."""
    done = subprocess.run(["sh", str(SET_UP), peer, str(peers_dir)], stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise AbsentError(last_line(done.stderr))
    home = (peers_dir / peer).resolve()
    return home, (home / "ready.stamp").read_text().strip()


def convert_for_llama(home: Path, checkpoint: Path, kind: str) -> Path:
    """Returns the GGUF file, made from the checkpoint where it is missing or older. Raises AbsentError."""
    (source,) = home.glob("llama_cpp_python-*/vendor/llama.cpp")
    whole = checkpoint.with_name(f"{checkpoint.name}.bf16.gguf")
    converter = [sys.executable, "-m", "tests.benchmarks.peers.convert_to_gguf"]
    _make(whole, checkpoint / "model.safetensors", [*converter, str(source), str(checkpoint)], ())
    if kind == "bf16":
        return whole
    quantized = checkpoint.with_name(f"{checkpoint.name}.{kind}.gguf")
    _make(quantized, whole, [str(home / "build" / "bin" / "llama-quantize"), str(whole)], (kind,))
    return quantized


def export_for_openvino(home: Path, checkpoint: Path) -> Path:
    """Returns the folder of the exported model. Raises AbsentError."""
    folder = checkpoint.with_name(f"{checkpoint.name}.openvino")
    exporter = [str(home / "venv" / "bin" / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
    task = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
    _make(folder, checkpoint / "model.safetensors", [*exporter, *task], ())
    return folder


def _make(target: Path, source: Path, command: list[str], behind: tuple[str, ...]) -> None:
    """Runs command + target + behind, unless the target is newer than the source. What fails leaves no target."""
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
        return
    unfinished = target.with_name(f"unfinished-{target.name}")
    done = subprocess.run(
        [*command, str(unfinished), *behind], cwd=THIS_CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode != 0:
        raise AbsentError(f"{Path(command[0]).name}: {last_line(done.stderr.decode(errors='replace'))}")
    if target.is_dir():
        shutil.rmtree(target)  # a folder that is not empty is not replaced
    unfinished.rename(target)


def last_line(words: str) -> str:
    """Returns the last line that says something."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"
