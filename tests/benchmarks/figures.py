"""From times to figures. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from tests.benchmarks.streaming_client import StreamTimes


@dataclass(frozen=True)
class RoundFigures:
    """One round: as many streams as the concurrency says, all sent at once."""

    ttft_s: float
    """Median over the streams, from sending the request to its first token."""
    last_ttft_s: float
    """Of the stream that waited longest: until then prompts are read beside answers."""
    tpot_s: float
    """Median over the streams of the mean time from one token to the next."""
    overall_tokens_per_s: float
    """Completion tokens of all streams over the time from the first sending to the last token: prefill included."""
    steady_tokens_per_s: float
    """Completion tokens a second while every stream decodes: after the last first token, before the first last one."""


def round_figures(streams: Sequence[StreamTimes]) -> RoundFigures:
    """Of streams with two tokens or more each."""
    started_s = min(stream.sent_s for stream in streams)
    ended_s = max(stream.arrivals[-1][0] for stream in streams)
    return RoundFigures(
        ttft_s=statistics.median(stream.arrivals[0][0] - stream.sent_s for stream in streams),
        last_ttft_s=max(stream.arrivals[0][0] - stream.sent_s for stream in streams),
        tpot_s=statistics.median(_mean_gap_s(stream) for stream in streams),
        overall_tokens_per_s=sum(stream.num_tokens for stream in streams) / (ended_s - started_s),
        steady_tokens_per_s=_steady_tokens_per_s(streams),
    )


def _mean_gap_s(stream: StreamTimes) -> float:
    (first_s, first_count), (last_s, _) = stream.arrivals[0], stream.arrivals[-1]
    return (last_s - first_s) / (stream.num_tokens - first_count)


def _steady_tokens_per_s(streams: Sequence[StreamTimes]) -> float:
    """NaN where no moment has all streams decoding (answers too short for so many prompts)."""
    # The window ( begin, end ]: what arrives at `begin` was made before it.
    begin_s = max(stream.arrivals[0][0] for stream in streams)
    end_s = min(stream.arrivals[-1][0] for stream in streams)
    if end_s <= begin_s:
        return math.nan
    inside = sum(count for stream in streams for at_s, count in stream.arrivals if begin_s < at_s <= end_s)
    return inside / (end_s - begin_s)


def median_figures(rounds: Sequence[RoundFigures]) -> RoundFigures:
    """Each figure's median by itself."""
    return RoundFigures(
        **{field.name: median([getattr(figures, field.name) for figures in rounds]) for field in fields(RoundFigures)}
    )


def median(values: Sequence[float]) -> float:
    """Of the values that are numbers; NaN if none is."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.median(numbers) if numbers else math.nan
