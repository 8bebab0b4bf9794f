"""One long prompt: its time to the first token beside the time that its products alone take at this run's rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.limits import prefill_s
from tests.benchmarks.make_bench_model import SIZES, make_bench_model
from tests.benchmarks.peers.engines import mesh_engine
from tests.benchmarks.rates import measure_rates
from tests.benchmarks.serve_benchmark import PromptSource

MODEL = "seed"
GOAL = 1.5


@dataclass(frozen=True)
class LongPrompt:
    """Medians over the tries."""

    model: str
    prompt_tokens: int
    ttft_s: float
    products_s: float
    """Linears, QK and PV at the best rates that were measured between the tries, with all cores."""
    products_by_torch_s: float
    """The same with QK and PV as fast as torch multiplies them, which is slower than our attention with bf16 pairs."""

    @property
    def ratio(self) -> float:
        return self.ttft_s / self.products_s

    @property
    def ratio_by_torch(self) -> float:
        return self.ttft_s / self.products_by_torch_s


def measure_long_prompt(models_dir: Path, prompt_tokens: int, tries: int) -> LongPrompt:
    """A mesh as it ships. Rates are taken before each try, while it idles: an hour's drift meets both."""
    checkpoint = make_bench_model(models_dir / f"{MODEL}-bfloat16", MODEL, "bfloat16")
    sizes = SIZES[MODEL]
    source = PromptSource(sizes.vocabulary)
    waits_s, products_s, products_by_torch_s = [], [], []
    with mesh_engine(checkpoint, {}) as engine:
        engine.run_round(source.take(1, 64), 4)
        for _ in range(tries):
            rates = measure_rates()
            linear_flop_per_s = max(rates.linear_flop_per_s, rates.linear_flop_per_s_all)
            by_torch = rates.attention_flop_per_s_all
            best = max(by_torch, rates.own_attention_flop_per_s_all)
            products_s.append(prefill_s(sizes, prompt_tokens, linear_flop_per_s, best))
            products_by_torch_s.append(prefill_s(sizes, prompt_tokens, linear_flop_per_s, by_torch))
            (stream,) = engine.run_round(source.take(1, prompt_tokens), 1)
            waits_s.append(stream.arrivals[0][0] - stream.sent_s)
    medians = (statistics.median(each) for each in (waits_s, products_s, products_by_torch_s))
    return LongPrompt(MODEL, prompt_tokens, *medians)


def describe(found: LongPrompt) -> Sequence[str]:
    """Returns sentences."""
    is_met = "met" if found.ratio <= GOAL else "not met"
    return (
        f"A prompt of {found.prompt_tokens:,} tokens on {found.model}: {found.ttft_s:.1f} s to the first token; its "
        f"linears, QK and PV alone take {found.products_s:.1f} s at this run's best rates. That is {found.ratio:.2f} "
        f"times as long; the goal of {GOAL} is {is_met}. With QK and PV at the rate of torch's products they take "
        f"{found.products_by_torch_s:.1f} s: {found.ratio_by_torch:.2f} times.",
    )
