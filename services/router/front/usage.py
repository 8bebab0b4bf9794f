"""The `usage` object: OpenAI's counts, and what it took to finish the reply in spite of losses. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.router.engine import RecoveryCounts
from services.router.front.planning import Plan


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `usage` tells of a reply that is complete."""

    num_completion_tokens: int
    recovery: RecoveryCounts
    is_durable: bool
    """Every token of it was in the journal when this was said."""


def running_usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    """OpenAI's counts alone."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def usage_of(plan: Plan, outcome: Outcome, is_extended: bool) -> dict[str, Any]:
    """OpenAI's usage object; extended by what it took to finish the reply in spite of losses."""
    usage: dict[str, Any] = {**running_usage(plan.num_prompt_tokens, outcome.num_completion_tokens)}
    if is_extended:
        usage["moemesh"] = {
            "recoveries": outcome.recovery.recoveries,
            "replayed_tokens": outcome.recovery.replayed_tokens,
            "retried_calls": outcome.recovery.retried_calls,
            "durable": outcome.is_durable,
        }
    return usage
