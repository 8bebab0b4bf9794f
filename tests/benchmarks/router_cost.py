"""What the router spends on a token: CPU time of its process, with clients that stream and stages that compute nothing.

    make bench-router BENCH_ARGS="--streams 256 --tokens 256 --rounds 5"

Stages, experts and clients are other processes. Each round streams from all clients at once; its figure is the CPU time
that the router used in it over the tokens that came, requests and prompts included.
"""

from __future__ import annotations

import argparse
import json
import selectors
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from common.processes.supervisor import LocalMesh
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.benchmarks.null_stage import FIRST_TOKEN
from tests.support.processes.process_table import process_size

READY_WITHIN_S = 120
SILENCE_S = 60
PROMPT_TOKENS = 16
END = b"data: [DONE]\n\n"


def request_bytes(address: str, tokens: int) -> bytes:
    """Returns one streamed completion request, head and body."""
    fields = {"model": "tiny", "prompt": [FIRST_TOKEN] * PROMPT_TOKENS, "max_tokens": tokens}
    body = json.dumps(fields | {"ignore_eos": True, "stream": True}).encode()
    lines = "POST /v1/completions HTTP/1.1", f"Host: {address}", f"Content-Length: {len(body)}", "Connection: close"
    return "\r\n".join([*lines, "", ""]).encode() + body


def run_round(url: str, streams: int, tokens: int) -> int:
    """Streams from all clients at once. Returns the bytes of the answers; raises RuntimeError where one is not whole.

    Clients only read: on a small machine their time is the router's.
    """
    address = urlsplit(url)
    place = (address.hostname or "127.0.0.1", address.port or 80)
    request = request_bytes(address.netloc, tokens)
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    num_bytes = 0
    for _ in range(streams):
        client = socket.create_connection(place)
        client.sendall(request)
        client.setblocking(False)
        selector.register(client, selectors.EVENT_READ, client)
        tails[client] = b""
    while tails:
        ready = selector.select(SILENCE_S)
        if not ready:
            raise RuntimeError(f"{len(tails)} streams stand still")
        for key, _ in ready:
            client = key.data
            data = client.recv(1 << 16)
            num_bytes += len(data)
            if data:
                tails[client] = (tails[client] + data)[-200:]
                continue
            selector.unregister(client)
            client.close()
            if END not in (tail := tails.pop(client)):
                raise RuntimeError(f"a stream broke off: {tail!r}")
    selector.close()
    return num_bytes


def measure(settings: Mapping[str, str], step_ms: float, streams: int, tokens: int, rounds: int) -> list[float]:
    """Returns microseconds of CPU time a token, by round; a round before the first is not counted."""
    folder = Path(tempfile.mkdtemp(prefix="router-cost-"))
    try:
        checkpoint = folder / "tiny"
        write_tiny_checkpoint(checkpoint)
        modules = {"stage": f"tests.benchmarks.null_stage {step_ms}"}
        with LocalMesh({"MODEL": str(checkpoint), "PORT": "0", **settings}, folder, modules=modules) as mesh:
            mesh.wait_ready(READY_WITHIN_S)
            router = dict(mesh.processes())["router-0"]
            found = []
            for _ in range(rounds + 1):
                before_s = process_size(router).cpu_s
                run_round(mesh.url, streams, tokens)
                found.append(1e6 * (process_size(router).cpu_s - before_s) / (streams * tokens))
            return found[1:]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.router_cost", description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=0.0, help="what a stage waits before it answers a step")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the mesh")
    parsed = parser.parse_args(arguments)
    if min(parsed.streams, parsed.tokens, parsed.rounds) < 1:
        parser.error("--streams, --tokens and --rounds must be 1 or more")
    settings = dict(setting.split("=", 1) for setting in parsed.set)
    found = measure(settings, parsed.step_ms, parsed.streams, parsed.tokens, parsed.rounds)
    print(f"{median(found):.1f} us of CPU time a token; rounds: {', '.join(f'{each:.1f}' for each in found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
