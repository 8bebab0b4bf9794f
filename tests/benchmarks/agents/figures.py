"""From played conversations to figures. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from tests.benchmarks.agents.conversations import Traffic
from tests.benchmarks.agents.playing import Played, PlayedTurn
from tests.benchmarks.figures import median
from tests.benchmarks.peers.sitting import percentile_95

WHOLE = ("seconds", "tokens/s", "TTFT p50", "TTFT p95", "TPOT p50")
"""Keys of what is said of all turns together."""
LATER_GROUPS = 4


def turn_groups(turns: int) -> list[range]:
    """Returns turn numbers, counted from 1, in groups: the first turn by itself, and the others in four at most."""
    size = math.ceil(turns / LATER_GROUPS)
    later = [range(max(2, start), min(start + size, turns + 1)) for start in range(1, turns + 1, size)]
    return [range(1, 2), *(group for group in later if len(group))]


def name_of(group: range) -> str:
    """Returns words for the head of a column."""
    return f"turn {group[0]}" if len(group) == 1 else f"turns {group[0]} to {group[-1]}"


def columns_of(rounds: Sequence[Played], traffic: Traffic) -> dict[str, float]:
    """Returns figures by key: `WHOLE`, and TTFT p50 and p95 by group of turns.

    Times of turns are quantiles over all rounds, in ms. `seconds`, from the first message to the last answer's end, and
    `tokens/s` over the same time are medians of the rounds. `seconds` is of rounds that were not stopped, NaN if there
    is none. A group that no conversation has come to has no figure.
    """
    turns = [turn for played in rounds for conversation in played for turn in conversation]
    waits_ms = [ttft_ms(turn) for turn in turns]
    figures = {
        "seconds": median([_seconds(played, traffic) for played in rounds]),
        "tokens/s": median([_tokens_per_s(played) for played in rounds]),
        "TTFT p50": statistics.median(waits_ms),
        "TTFT p95": percentile_95(waits_ms),
        "TPOT p50": median([_tpot_ms(turn) for turn in turns]),
    }
    for group in turn_groups(traffic.turns):
        if waits_ms := [ttft_ms(turn) for turn in turns_of(rounds, group)]:
            figures[f"TTFT p50 {name_of(group)}"] = statistics.median(waits_ms)
            figures[f"TTFT p95 {name_of(group)}"] = percentile_95(waits_ms)
    return figures


def cached_share(rounds: Sequence[Played], group: range) -> float:
    """Returns which part of the prompts' tokens was in the engine's cache by its own count, NaN if it does not say."""
    turns = list(turns_of(rounds, group))
    cached = [turn.answer.num_cached_tokens for turn in turns]
    known = [count for count in cached if count is not None]
    if not turns or len(known) < len(cached):
        return math.nan
    return sum(known) / sum(turn.prompt_tokens for turn in turns)


def turns_of(rounds: Sequence[Played], group: range) -> Iterator[PlayedTurn]:
    """Yields the turns of these numbers that were played."""
    for played in rounds:
        for conversation in played:
            yield from conversation[group.start - 1 : group.stop - 1]


def ttft_ms(turn: PlayedTurn) -> float:
    """Returns the time from sending a prompt to its first token."""
    times = turn.answer.times
    return 1000 * (times.arrivals[0][0] - times.sent_s)


def _tpot_ms(turn: PlayedTurn) -> float:
    """NaN where all tokens came at once."""
    times = turn.answer.times
    (first_s, first_count), (last_s, _) = times.arrivals[0], times.arrivals[-1]
    later_tokens = times.num_tokens - first_count
    return 1000 * (last_s - first_s) / later_tokens if later_tokens else math.nan


def _seconds(played: Played, traffic: Traffic) -> float:
    is_whole = all(len(conversation) == traffic.turns for conversation in played)
    return _span_s(played) if is_whole else math.nan


def _tokens_per_s(played: Played) -> float:
    return sum(turn.answer.times.num_tokens for conversation in played for turn in conversation) / _span_s(played)


def _span_s(played: Played) -> float:
    times = [turn.answer.times for conversation in played for turn in conversation]
    return max(each.arrivals[-1][0] for each in times) - min(each.sent_s for each in times)
