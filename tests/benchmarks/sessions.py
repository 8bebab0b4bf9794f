"""A conversation whose blocks others needed: its time to the first token beside a cold one, and what it costs others.

    python -m tests.benchmarks.sessions [--quick]

One mesh as it ships, but for a pool that holds the conversation and little more. In each try prompts of others take the
whole pool, then the conversation comes again while somebody decodes, and once more alone.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tests.benchmarks.make_bench_model import SIZES, make_bench_model
from tests.benchmarks.peers.engines import HttpEngine, mesh_engine
from tests.benchmarks.serve_benchmark import PromptSource
from tests.benchmarks.streaming_client import StreamTimes, run_clients
from tests.support.served.metrics_text import read_metrics

GOAL = 0.1
SLACK_TOKENS = 1024
"""What the pool holds beside the conversation: a stream that decodes, and the answers."""
OTHERS_TOKENS = 256
LEAD_TOKENS = 32
"""What is decoded before the conversation comes again."""


@dataclass(frozen=True)
class Sessions:
    """Seconds to the first token; medians over the tries."""

    model: str
    prompt_tokens: int
    cold_s: float
    in_blocks_s: float
    """While nobody else has needed them."""
    restored_s: float
    restored_beside_s: float
    """Beside a stream that decodes."""
    usual_gap_s: float
    """Between the tokens of that stream, before the conversation comes."""
    gap_s: float
    """The same from when it is sent to its first token."""

    @property
    def ratio(self) -> float:
        return self.restored_s / self.cold_s


def measure_sessions(models_dir: Path, model: str, prompt_tokens: int, tries: int) -> Sessions:
    """Raises RuntimeError if the mesh does not say that all of it came back."""
    checkpoint = make_bench_model(models_dir / f"{model}-bfloat16", model, "bfloat16")
    source = PromptSource(SIZES[model].vocabulary)
    pool_tokens = prompt_tokens + SLACK_TOKENS
    alone_s, beside_s, usual_s, gaps_s = [], [], [], []
    with mesh_engine(checkpoint, {"KV_CACHE_TOKENS": str(pool_tokens)}) as engine:
        engine.run_round(source.take(1, 64), 4)
        (conversation,) = source.take(1, prompt_tokens)
        cold_s, in_blocks_s = (first_token_s(*engine.run_round([conversation], 1)) for _ in range(2))
        for _ in range(tries):
            take_pool(engine, source, pool_tokens)
            alone_s.append(first_token_s(*engine.run_round([conversation], 1)))
            take_pool(engine, source, pool_tokens)
            decoding, again = beside(engine, source.take(1, 64)[0], conversation)
            beside_s.append(first_token_s(again))
            usual, gap = mean_gaps_s(decoding, again.sent_s, again.arrivals[0][0])
            usual_s.append(usual)
            gaps_s.append(gap)
        check_restored(engine, 2 * tries * ((prompt_tokens - 1) // 32))
    return Sessions(
        model,
        prompt_tokens,
        cold_s,
        in_blocks_s,
        statistics.median(alone_s),
        statistics.median(beside_s),
        statistics.median(usual_s),
        statistics.median(gaps_s),
    )


def take_pool(engine: HttpEngine, source: PromptSource, pool_tokens: int) -> None:
    """Lets prompts of others take every block."""
    for _ in range(pool_tokens // (4 * OTHERS_TOKENS) + 1):
        engine.run_round(source.take(4, OTHERS_TOKENS), 1)


def beside(engine: HttpEngine, prompt: Sequence[int], conversation: Sequence[int]) -> tuple[StreamTimes, StreamTimes]:
    """One stream decodes, and the conversation comes while it does. Returns both."""
    address = urlsplit(engine.url)
    common = {"temperature": 1.0, "ignore_eos": True, "seed": 1, **engine.fields}

    def body(prompt_ids: Sequence[int], max_tokens: int) -> dict[str, object]:
        return common | {"prompt": list(prompt_ids), "max_tokens": max_tokens}

    lead = body(prompt[:8], LEAD_TOKENS)
    clients = [[body(prompt, 8 * LEAD_TOKENS)], [lead, body(conversation, 1)]]
    timed = asyncio.run(run_clients(address.hostname or "127.0.0.1", address.port or 80, clients))
    decoding, _, again = timed.streams
    return decoding, again


def first_token_s(stream: StreamTimes) -> float:
    """From sending the request."""
    return stream.arrivals[0][0] - stream.sent_s


def mean_gaps_s(stream: StreamTimes, start_s: float, stop_s: float) -> tuple[float, float]:
    """Returns the mean time between a stream's tokens before `start_s`, and from the last one before that to the first
    one behind `stop_s`."""
    times_s = [at_s for at_s, _ in stream.arrivals]
    before = [at_s for at_s in times_s if at_s <= start_s]
    within = [at_s for at_s in times_s if start_s < at_s < stop_s]
    behind = next(at_s for at_s in times_s if at_s >= stop_s)
    return (before[-1] - before[0]) / (len(before) - 1), (behind - before[-1]) / (len(within) + 1)


def check_restored(engine: HttpEngine, num_blocks: int) -> None:
    """Raises RuntimeError if fewer blocks have come back from the session tier."""
    found = read_metrics(httpx.get(f"{engine.url}/metrics", trust_env=False).text)
    restored = found.by_label("moemesh_prefix_blocks_found_total", "tier")["session"]
    if restored < num_blocks:
        raise RuntimeError(f"{restored:.0f} blocks have come back from the session tier, {num_blocks} should have")


def describe(found: Sessions) -> str:
    """Returns sentences."""
    is_met = "met" if found.ratio <= GOAL else "not met"
    return (
        f"A conversation of {found.prompt_tokens:,} tokens on {found.model}: {found.cold_s:.2f} s to the first token "
        f"when it is computed, {found.in_blocks_s:.3f} s from its blocks, {found.restored_s:.3f} s from the session "
        f"tier. That is {found.ratio:.4f} of cold; the goal of {GOAL} is {is_met}. Beside a stream that decodes: "
        f"{found.restored_beside_s:.3f} s, and that stream's tokens come {found.gap_s * 1000:.1f} ms after each other "
        f"meanwhile, {found.usual_gap_s * 1000:.1f} ms before."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the sentences."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sessions", description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="bench")
    parser.add_argument("--prompt-tokens", type=int, default=16_384)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one try of 2,048 tokens: does it all run?")
    parser.add_argument("--models-dir", type=Path, default=Path("state/bench-models"))
    parsed = parser.parse_args(arguments)
    prompt_tokens, tries = (2048, 1) if parsed.quick else (parsed.prompt_tokens, parsed.tries)
    print(describe(measure_sessions(parsed.models_dir, parsed.model, prompt_tokens, tries)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
