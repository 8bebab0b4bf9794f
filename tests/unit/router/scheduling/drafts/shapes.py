"""The sizes of the benchmarks' model, as a router sees them."""

from __future__ import annotations

from services.router.scheduling.drafts.step_times import StepShape
from tests.benchmarks.make_bench_model import SIZES

_SIZES = SIZES["bench"]
_ATTENTION = 2 * _SIZES.width * (_SIZES.heads + _SIZES.kv_heads) * _SIZES.head_width
BENCH = StepShape(
    num_experts=_SIZES.experts,
    num_experts_per_token=_SIZES.experts_per_token,
    weights_per_expert=_SIZES.layers * 3 * _SIZES.width * _SIZES.expert_width,
    other_weights=_SIZES.layers * (_ATTENTION + _SIZES.experts * _SIZES.width) + _SIZES.vocabulary * _SIZES.width,
)
