"""What bytes and products alone allow: figures to hold a measurement against. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks.make_bench_model import BenchSizes

BYTES_A_WEIGHT = 2


@dataclass(frozen=True)
class PrefillFlop:
    """Operations of one prompt, a multiplication and an addition counted as two."""

    linears: float
    attention: float
    """QK and PV, of the positions that each token sees."""


def distinct_experts(sizes: BenchSizes, streams: int) -> float:
    """Returns the expected number of experts of a layer that a step of so many rows needs, if routing is random."""
    share_missed = 1 - sizes.experts_per_token / sizes.experts
    return sizes.experts * (1 - share_missed**streams)


def step_weight_bytes(sizes: BenchSizes, streams: int) -> float:
    """Returns the bytes of distinct bf16 weights that one decode step reads; of the embedding it reads single rows."""
    layer = _attention_weights(sizes) + distinct_experts(sizes, streams) * _expert_weights(sizes)
    return BYTES_A_WEIGHT * (sizes.layers * layer + sizes.vocabulary * sizes.width)


def decode_limit(sizes: BenchSizes, streams: int, read_bytes_per_s: float) -> float:
    """Returns the tokens a second of all streams if a step took as long as its weights take to be read."""
    return streams * read_bytes_per_s / step_weight_bytes(sizes, streams)


def prefill_flop(sizes: BenchSizes, tokens: int) -> PrefillFlop:
    """Returns the operations of a prompt whose last token alone gets logits."""
    layer = _attention_weights(sizes) + sizes.experts_per_token * _expert_weights(sizes)
    linears = 2 * (tokens * sizes.layers * layer + sizes.vocabulary * sizes.width)
    pairs = tokens * (tokens + 1) / 2
    return PrefillFlop(linears, 2 * 2 * sizes.layers * sizes.heads * sizes.head_width * pairs)


def prefill_limit(sizes: BenchSizes, tokens: int, flop_per_s: float) -> float:
    """Returns the prompt tokens a second if all products ran at that rate."""
    flop = prefill_flop(sizes, tokens)
    return tokens * flop_per_s / (flop.linears + flop.attention)


def prefill_s(sizes: BenchSizes, tokens: int, linear_flop_per_s: float, attention_flop_per_s: float) -> float:
    """Returns the seconds that a prompt's linears take at one rate, and QK and PV at another."""
    flop = prefill_flop(sizes, tokens)
    return flop.linears / linear_flop_per_s + flop.attention / attention_flop_per_s


def _attention_weights(sizes: BenchSizes) -> int:
    """Of one layer: the projections and the gate."""
    projections = 2 * sizes.width * (sizes.heads + sizes.kv_heads) * sizes.head_width
    return projections + sizes.experts * sizes.width


def _expert_weights(sizes: BenchSizes) -> int:
    return 3 * sizes.width * sizes.expert_width
