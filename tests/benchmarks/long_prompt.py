"""One long prompt: its time to the first token beside the time that its products alone take at this run's rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.limits import prefill_s
from tests.benchmarks.make_bench_model import SIZES, make_bench_model
from tests.benchmarks.peers.engines import mesh_engine
from tests.benchmarks.rates import best_rates, measure_rates
from tests.benchmarks.serve_benchmark import PromptSource

MODEL = "seed"
GOAL = 1.5


@dataclass(frozen=True)
class LongPrompt:
    """The median over the tries, beside the best rates."""

    model: str
    prompt_tokens: int
    ttft_s: float
    products_s: float
    """Linears, QK and PV at the best rates that were measured between the tries, with all cores."""

    @property
    def ratio(self) -> float:
        return self.ttft_s / self.products_s


def measure_long_prompt(models_dir: Path, prompt_tokens: int, tries: int) -> LongPrompt:
    """A mesh as it ships. Rates are taken before each try, while it idles; the best of all tries count."""
    checkpoint = make_bench_model(models_dir / f"{MODEL}-bfloat16", MODEL, "bfloat16")
    sizes = SIZES[MODEL]
    source = PromptSource(sizes.vocabulary)
    waits_s, measured = [], []
    with mesh_engine(checkpoint, {}) as engine:
        engine.run_round(source.take(1, 64), 4)
        for _ in range(tries):
            measured.append(measure_rates())
            (stream,) = engine.run_round(source.take(1, prompt_tokens), 1)
            waits_s.append(stream.arrivals[0][0] - stream.sent_s)
    rates = best_rates(measured)
    linear_flop_per_s = max(rates.linear_flop_per_s, rates.linear_flop_per_s_all)
    products_s = prefill_s(sizes, prompt_tokens, linear_flop_per_s, rates.attention_flop_per_s_all)
    return LongPrompt(MODEL, prompt_tokens, statistics.median(waits_s), products_s)


def describe(found: LongPrompt) -> Sequence[str]:
    """Returns sentences."""
    is_met = "met" if found.ratio <= GOAL else "not met"
    return (
        f"A prompt of {found.prompt_tokens:,} tokens on {found.model}: {found.ttft_s:.1f} s to the first token; its "
        f"linears, QK and PV alone take {found.products_s:.1f} s at this run's rates. That is {found.ratio:.2f} times "
        f"as long; the goal of {GOAL} is {is_met}.",
    )
