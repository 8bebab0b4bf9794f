"""One sitting: all figures of one engine, in one go, with prompts that nobody has seen before."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.figures import RoundFigures, median_figures, round_figures
from tests.benchmarks.peers.engines import Engine
from tests.benchmarks.serve_benchmark import PromptSource
from tests.benchmarks.streaming_client import StreamTimes

WARM_UP_TOKENS = 4
LONE_STREAM_TRIES = 3
"""A single stream is soon done."""


@dataclass(frozen=True)
class Load:
    """What each engine gets."""

    concurrencies: tuple[int, ...]
    prompt_tokens: int
    answer_tokens: int
    prefill_tokens: tuple[int, ...]
    """Lengths of prompts that are timed by themselves."""
    prefill_tries: int
    crowd: int
    """Streams of the round in which the waiting for first tokens is measured."""
    crowd_prompt_tokens: int
    crowd_answer_tokens: int


@dataclass(frozen=True)
class Sitting:
    """What one engine did in one round."""

    levels: dict[int, RoundFigures]
    """By concurrency."""
    prefill_s: dict[int, float]
    """By prompt length: the median time to the first token."""
    crowd_ttft_s: tuple[float, ...]


def sit(engine: Engine, source: PromptSource, load: Load) -> Sitting:
    """Every shape is warmed up first, by prompts and answers of its own."""
    return Sitting(
        levels={concurrency: _level(engine, source, load, concurrency) for concurrency in load.concurrencies},
        prefill_s={length: _prefill_s(engine, source, load, length) for length in load.prefill_tokens},
        crowd_ttft_s=_crowd_ttft_s(engine, source, load),
    )


def _level(engine: Engine, source: PromptSource, load: Load, concurrency: int) -> RoundFigures:
    tries = LONE_STREAM_TRIES if concurrency == 1 else 1
    engine.run_round(source.take(concurrency, load.prompt_tokens), WARM_UP_TOKENS)
    rounds = [engine.run_round(source.take(concurrency, load.prompt_tokens), load.answer_tokens) for _ in range(tries)]
    return median_figures([round_figures(streams) for streams in rounds])


def _prefill_s(engine: Engine, source: PromptSource, load: Load, length: int) -> float:
    engine.run_round(source.take(1, length), 1)
    tries = [engine.run_round(source.take(1, length), 1) for _ in range(load.prefill_tries)]
    return statistics.median(_ttft_s(stream) for (stream,) in tries)


def _crowd_ttft_s(engine: Engine, source: PromptSource, load: Load) -> tuple[float, ...]:
    engine.run_round(source.take(load.crowd, load.prompt_tokens), WARM_UP_TOKENS)
    streams = engine.run_round(source.take(load.crowd, load.crowd_prompt_tokens), load.crowd_answer_tokens)
    return tuple(_ttft_s(stream) for stream in streams)


def _ttft_s(stream: StreamTimes) -> float:
    return stream.arrivals[0][0] - stream.sent_s


def columns_of(sittings: Sequence[Sitting], load: Load) -> dict[str, float]:
    """Returns the figures of the tables by their keys: medians over the rounds; of waiting times, quantiles of all."""
    levels = {c: median_figures([sitting.levels[c] for sitting in sittings]) for c in load.concurrencies}
    prefill_s = {
        length: statistics.median(sitting.prefill_s[length] for sitting in sittings) for length in load.prefill_tokens
    }
    waits_ms = [1000 * wait_s for sitting in sittings for wait_s in sitting.crowd_ttft_s]
    return (
        {f"steady x{c}": figures.steady_tokens_per_s for c, figures in levels.items()}
        | {f"overall x{c}": figures.overall_tokens_per_s for c, figures in levels.items()}
        | {f"prefill {length}": length / seconds for length, seconds in prefill_s.items()}
        | {"TTFT p50": statistics.median(waits_ms), "TTFT p95": percentile_95(waits_ms)}
    )


def percentile_95(values: Sequence[float]) -> float:
    """Returns it interpolated between neighbours; the value itself where there is only one."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
