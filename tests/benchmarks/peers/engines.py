"""Engines as the benchmark's one client sees them, each started for one sitting and ended after it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from tests.benchmarks.checkout_mesh import THIS_CHECKOUT, checkout_mesh
from tests.benchmarks.streaming_client import Answer, StreamTimes, ask, run_round

READY_WITHIN_S = 600
"""vLLM compiles the model when it meets it for the first time."""
ENDED_WITHIN_S = 30
LOG_TAIL_CHARACTERS = 1500
SLOT_UNIT_TOKENS = 256
VLLM_CACHE_GIB = 4
VLLM_MAX_STREAMS = 64
VLLM_CONTEXT_TOKENS = 4096
"""The same in every run: its compiled graph is kept by such settings."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class Engine(Protocol):
    """Something that answers prompts."""

    def run_round(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Sequence[StreamTimes]:
        """All prompts at once, `max_tokens` tokens each. Raises RuntimeError if that is not what comes."""
        ...


@dataclass
class HttpEngine:
    """A server with /v1/completions."""

    url: str
    fields: Mapping[str, Any]
    """What its requests carry besides prompt, length and, where `has_seeds`, a seed."""
    has_seeds: bool = True
    _seeds: Iterator[int] = field(default_factory=itertools.count)

    def run_round(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Sequence[StreamTimes]:
        bodies = [self._body(prompt, max_tokens, next(self._seeds)) for prompt in prompts]
        timed = asyncio.run(run_round(*self._address, bodies))
        for stream in timed.streams:
            _check_count(stream.num_tokens, max_tokens)
        return timed.streams

    async def ask(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Answer:
        """One prompt, `max_tokens` tokens. Raises RuntimeError if that is not what comes, with all ids."""
        body = self._body(prompt, max_tokens, seed) | {"stream_options": {"include_usage": True}}
        answer = await ask(*self._address, body)
        _check_count(len(answer.token_ids), max_tokens)
        return answer

    @property
    def _address(self) -> tuple[str, int]:
        address = urlsplit(self.url)
        return address.hostname or "127.0.0.1", address.port or 80

    def _body(self, prompt: Sequence[int], max_tokens: int, seed: int) -> dict[str, Any]:
        common = {"max_tokens": max_tokens, "temperature": 1.0, "ignore_eos": True, **self.fields}
        return common | ({"seed": seed} if self.has_seeds else {}) | {"prompt": list(prompt)}


def _check_count(num_tokens: int, max_tokens: int) -> None:
    if num_tokens != max_tokens:
        raise RuntimeError(f"asked for {max_tokens} tokens, got {num_tokens}")


@contextmanager
def mesh_engine(checkpoint: Path, settings: Mapping[str, str]) -> Iterator[HttpEngine]:
    """A mesh of this checkout with its defaults, but for `settings`."""
    with checkout_mesh(THIS_CHECKOUT, {"MODEL": str(checkpoint.resolve()), **settings}) as mesh:
        yield HttpEngine(mesh.url, {"model": _model_of(mesh.url)})


@contextmanager
def vllm_engine(
    home: Path,
    checkpoint: Path,
    cores: Sequence[int],
    context_tokens: int = VLLM_CONTEXT_TOKENS,
    caches_prompts: bool = False,
) -> Iterator[HttpEngine]:
    """vLLM's CPU build, with the settings that its documentation names for one.

    Seeded as a whole: a request's own seed makes it draw row by row.
    """
    caching = ("--enable-prefix-caching", "--enable-prompt-tokens-details")
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        str(home / "venv" / "bin" / "python"),
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(checkpoint), "--dtype", "bfloat16", "--seed", "0"),
        *("--max-model-len", str(context_tokens), "--max-num-seqs", str(VLLM_MAX_STREAMS)),
        *(caching if caches_prompts else ("--no-enable-prefix-caching",)),
        *("--host", "127.0.0.1", "--port", str(urlsplit(url).port)),
    ]
    preloaded = [*(home / "tcmalloc").rglob("libtcmalloc_minimal.so.4"), home / "venv" / "lib" / "libiomp5.so"]
    environment = OFFLINE | {
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CACHE_ROOT": str((home / "cache").resolve()),
        "LD_PRELOAD": ":".join(str(path.resolve()) for path in preloaded if path.exists()),
    }
    with _server(command, environment, url, home / "server.log"):
        yield HttpEngine(url, {"model": str(checkpoint), "top_k": -1, "top_p": 1.0}, has_seeds=False)


class LlamaEngine:
    """llama-server, started anew for each number of streams: `-np` decides what it reserves and how it batches."""

    def __init__(self, home: Path, weights: Path, threads: int) -> None:
        self._home, self._weights, self._threads = home, weights, threads
        self._shape = (0, 0)
        self._running = contextlib.ExitStack()
        self._engine: HttpEngine | None = None

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._running.close()

    def run_round(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Sequence[StreamTimes]:
        """Starts another server first where this one has other slots, or shorter ones: a warm-up has to come before."""
        needed = max(len(prompt) for prompt in prompts) + max_tokens
        streams, slot_tokens = self._shape
        if self._engine is None or streams != len(prompts) or slot_tokens < needed:
            self._shape = (len(prompts), (needed // SLOT_UNIT_TOKENS + 1) * SLOT_UNIT_TOKENS)
            self._restart()
        assert self._engine is not None, "a server was just started"
        return self._engine.run_round(prompts, max_tokens)

    def _restart(self) -> None:
        self._running.close()
        engine = llama_engine(self._home, self._weights, self._threads, *self._shape, {"cache_prompt": False})
        self._engine = self._running.enter_context(engine)


@contextmanager
def llama_engine(
    home: Path, weights: Path, threads: int, streams: int, slot_tokens: int, fields: Mapping[str, Any]
) -> Iterator[HttpEngine]:
    """llama-server with so many slots of so many tokens each. Its requests carry `fields`, too."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        str(home / "build" / "bin" / "llama-server"),
        *("-m", str(weights), "-t", str(threads), "-tb", str(threads)),
        *("-np", str(streams), "-c", str(streams * slot_tokens), "--cont-batching", "-fa", "auto"),
        *("--no-kv-unified", "--cache-ram", "0", "--no-ui"),
        *("--host", "127.0.0.1", "--port", str(urlsplit(url).port)),
    ]
    # Its own default samplers cut the vocabulary; nobody else here does.
    sampling = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    with _server(command, {}, url, home / "server.log"):
        yield HttpEngine(url, {"timings_per_token": True, **sampling, **fields})


@contextmanager
def _server(command: Sequence[str], environment: Mapping[str, str], url: str, log_path: Path) -> Iterator[None]:
    """Runs a server until the block ends. Raises RuntimeError with its last words if it does not become ready."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # So that what it starts can be ended with it.
            start_new_session=True,
        )
    try:
        _wait_healthy(process, url, log_path)
        yield
    finally:
        _end(process)


def _wait_healthy(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", trust_env=False, timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    written = log_path.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]
    raise RuntimeError(f"{process.args!r} was not ready (status {process.returncode}):\n{written}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(ENDED_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # What it left behind, if anything.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _model_of(url: str) -> str:
    return str(httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"])


def free_port() -> int:
    """Returns a port of the loopback address that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
